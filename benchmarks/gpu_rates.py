"""Rates that decide what a GPU's path can reach: memory, link, waits, drive, and selection on the device."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import gpu_select
from hillinfer import native
from hillinfer.tiers.block_file import MAX_READ, BlockFile, aligned

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
    """A layer's scores, ranks and top-k by codes on the device, against the same on the host."""
    random = np.random.default_rng(0)
    codes = torch.from_numpy(random.integers(-127, 128, (1, heads, n, dim), np.int8))
    query = torch.from_numpy(random.integers(-127, 128, (1, heads, group, dim), np.int8))
    steps, k = torch.full((1, heads * group), 0.7), n // 10
    there = codes.to(device), query.to(device), steps.to(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    host = ms(lambda: gpu_select.on_host(codes[0], query[0], steps[0], k), n=3)
    return {"device ms": ms(lambda: gpu_select.select(*there, k), wait), "host ms": host}


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
