"""Rates that decide what a GPU's path can reach: memory, link, waits, drive, and selection on the device."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hillinfer import native
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.evaluator.policies.topk import TopK
from hillinfer.evaluator.policy import Step
from hillinfer.evaluator.ranks import head_ranks
from hillinfer.growable import aligned
from hillinfer.tiers.block_file import MAX_READ, BlockFile

Rate = tuple[str, Callable[[], dict]]


def ms(work: Callable[[], object], wait: Callable[[], object] = lambda: None, n: int = 7) -> float:
    """The median time of a piece of work."""
    took = []
    for _ in range(n + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took[1:])


def rates(device: str, real: bool, folders: dict[str, Path]) -> Iterator[Rate]:
    """What to measure: a name, and a function that does. `real` is False for a stand-in, whose times say nothing."""
    words = np.ones(1 << 22, np.uint64)
    for k in sorted({1, torch.get_num_threads()}):
        yield f"host memory, {k} threads", partial(memory, words, k)
        yield f"a native call, {k} threads", lambda k=k: {"us": 1e3 * ms(lambda: native.read(words[:512], k), n=50)}
    for name, folder in folders.items():
        yield f"reads, {name}", partial(reads, folder)
    for n in (2048,) if not real else (32_768, 131_072):
        yield f"selection on the device, {n} tokens", partial(selection, device, n)
    if not real:
        return
    for size in (4096, 1 << 20, 1 << 26):
        for pinned in (True, False):
            for way in ("to the GPU", "from the GPU"):
                yield f"{size} bytes {way}, {'pinned' if pinned else 'pageable'}", partial(link, size, pinned, way)
    yield "launches and waits", launches
    for name, folder in folders.items():
        yield f"O_DIRECT into pinned memory, {name}", partial(into_pinned, folder)


def memory(words: np.ndarray, threads: int) -> dict:
    return {"gb_s": words.nbytes / ms(lambda: native.read(words, threads)) / 1e6}


def reads(folder: Path, size: int = 1 << 26) -> dict:
    """Random reads of 4 KiB and of the largest size."""
    file, row = BlockFile(folder), {}
    try:
        base, whole = file.allocate(size), aligned(size)
        whole[:] = 1
        pieces = range(0, size, MAX_READ)
        file.transfer("write", [(base + at, whole[at : at + MAX_READ]) for at in pieces], 0, 0)
        for block, count in ((4096, 2000), (MAX_READ, size // MAX_READ)):
            places = np.random.default_rng(0).permutation(size // block)[:count] * block
            jobs = [(base + int(at), whole[int(at) : int(at) + block]) for at in places]
            took = ms(lambda jobs=jobs: file.transfer("read", jobs, 0, 0), n=3)
            row |= {f"{block} gb_s": len(jobs) * block / took / 1e6, f"{block} k_iops": len(jobs) / took}
        return row
    finally:
        file.close()


def link(size: int, pinned: bool, way: str) -> dict:
    there, here = (torch.ones(size, dtype=torch.uint8, device=at) for at in ("cuda", "cpu"))
    here = here.pin_memory() if pinned else here
    out, source = (there, here) if way == "to the GPU" else (here, there)
    took = ms(lambda: out.copy_(source, non_blocking=pinned), torch.cuda.synchronize, 50 if size < 1 << 25 else 7)
    return {"us": 1e3 * took, "gb_s": size / took / 1e6}


def launches() -> dict:
    x, wait = torch.ones(1, device="cuda"), torch.cuda.synchronize
    many = ms(lambda: [x.add_(1) for _ in range(1000)], wait)
    return {"launch us": many, "launch and wait us": 1e3 * ms(lambda: x.add_(1), wait, 200)}


def selection(device: str, n: int, heads: int = 8, group: int = 4, dim: int = 128) -> dict:
    """A layer's encoding of a token, scores, ranks and top-k by codes on the device, and on the host."""
    keys, query, took = torch.randn(1, heads, n, dim), torch.randn(1, heads * group, dim), {}
    sizes = n + 1, n // 10, 4, 16, 0, 0

    def step(codes: KeyCodes, key: torch.Tensor, asked: torch.Tensor, policy: TopK) -> object:
        codes.append(key)
        codes.truncate(n + 1)
        if codes.scale.device.type != "cpu":
            return policy.choose(Step(*sizes, lambda: codes.ranks(asked, 0.1, None), None))
        coded, unit = codes.query(asked[0], 0)
        ranks = head_ranks(codes.scorer(coded, 0)(None), np.repeat(unit * np.float32(0.1), group))
        return policy.select(Step(*sizes, lambda: ranks, None))

    for where in dict.fromkeys((device, "cpu")):
        codes = KeyCodes(1, heads, dim, 8, where)
        codes.append(keys.to(where))
        wait = torch.cuda.synchronize if where == "cuda" else lambda: None
        work = partial(step, codes, keys[:, :, :1].to(where), query.to(where), TopK())
        took["host ms" if where == "cpu" else "device ms"] = ms(work, wait)
    return took


def into_pinned(folder: Path) -> dict:
    """Whether the drive reads into memory of cudaHostAlloc and into what is registered."""
    file, size = BlockFile(folder), 1 << 20
    try:
        base, own = file.allocate(size), aligned(size)
        own[:] = 1
        file.transfer("write", [(base, own)], 0, 0)
        file.transfer("read", [(base, torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy())], 0, 0)
        code = int(torch.cuda.cudart().cudaHostRegister(own.ctypes.data, own.nbytes, 0))
        file.transfer("read", [(base, own)], 0, 0)
        torch.cuda.cudart().cudaHostUnregister(own.ctypes.data)
        return {"registered": code == 0}
    finally:
        file.close()
