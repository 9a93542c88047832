"""Measured throughput of this machine's parts, for its device profile: medians, with the range in the source."""

import os
import statistics
import time
import timeit
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hillinfer.evaluator.codes import head_scores
from hillinfer.growable import aligned
from hillinfer.systems.hillinfer.drive import EmulatedDrive
from hillinfer.systems.hillinfer.profile import Rate
from hillinfer.systems.hillinfer.protocol import Emulation, Shape
from hillinfer.tiers.block_file import MAX_READ, BlockFile

BLOCKS = tuple(1 << bits for bits in (12, 14, 16, 18, 20, 24, 27))  # transfer sizes: 4 KiB to 128 MiB
# One layer of a Llama-3-8B at 16K tokens, 64 MiB of records in bf16, of which a step selects SELECTED at random.
TOKENS, HEADS, GROUP, DIM, SELECTED = 16_384, 8, 4, 128, 0.1
RECORD_BYTES = 2 * HEADS * DIM * 2


def measure_parts(folder: Path, paced: bool = False) -> dict[str, dict[str, Rate]]:
    """Memory, bandwidth and flops of host and GPU; the drive by transfer size, with O_DIRECT; scoring and fetching.

    `paced` holds the emulated drive to a SmartSSD's rates.
    """
    memory, scoring = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), measure_scoring(folder, paced)
    lanes = _rate(len(os.sched_getaffinity(0)))
    parts = scoring | {"cpu": {"memory": _rate(memory), **_compute("cpu"), "lanes": lanes, **scoring["cpu"]}}
    if torch.cuda.is_available():
        parts["gpu"] = {"memory": _rate(torch.cuda.mem_get_info()[1]), **_compute("cuda")}
        parts["link"] = {"to_gpu": _link("cpu", "cuda"), "from_gpu": _link("cuda", "cpu")}
    return parts | {"drive": _drive(folder)}


def measure_scoring(folder: Path, paced: bool = False) -> dict[str, dict[str, Rate]]:
    """Rates of the host and the emulated drive for scoring key codes and collecting selected records."""
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(-127, 128, (HEADS, TOKENS, DIM), np.int8))
    query = torch.from_numpy(rng.integers(-127, 128, (HEADS, GROUP, DIM), np.int8))
    records = torch.from_numpy(rng.integers(0, 255, (TOKENS, RECORD_BYTES), np.uint8))
    selected = np.sort(rng.choice(TOKENS, int(SELECTED * TOKENS), replace=False))
    index, nbytes = torch.from_numpy(selected), len(selected) * RECORD_BYTES
    note = ", paced to a SmartSSD's rates" if paced else ""
    with closing(EmulatedDrive(folder, Shape(1, 1, RECORD_BYTES, HEADS, DIM), Emulation(paced=paced))) as drive:
        drive.write(0, 0, records.numpy(), codes.numpy())
        drive.hold(0, np.arange(TOKENS), False)
        drive.report()  # waits for the writes
        score = _time(codes.nbytes, lambda: list(drive.begin_evaluate(0, query.numpy())), note=note)
        emulated = {"score": score, "fetch": _time(nbytes, lambda: drive.fetch(0, selected), note=note)}
    score = _time(codes.nbytes, lambda: head_scores(query, codes))
    host = {"score": score, "gather": _time(nbytes, lambda: records.index_select(0, index))}
    return {"cpu": host, "emulated": emulated}


def _rate(*values: float, note: str = "by hillinfer profile", blocks: tuple[float, ...] = (1.0,)) -> Rate:
    return Rate(tuple(map(float, values)), f"measured: {time.strftime('%Y-%m-%d')}, {note}", blocks)


def _time(amount: float, work: Callable[[], object], repeats: int = 5, note: str = "") -> Rate:
    """`amount` per second, the median of `repeats` runs after one that warms up."""

    def once() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    rates = sorted(amount / took for took in timeit.repeat(once, number=1, repeat=repeats + 1)[1:])
    return _rate(statistics.median(rates), note=f"median of {repeats}, {rates[0]:.3g} to {rates[-1]:.3g}{note}")


def _curve(rates: dict[int, Rate]) -> Rate:
    """Rates by transfer size as one curve."""
    blocks = sorted(rates)
    return _rate(*(rates[block].values[0] for block in blocks), blocks=tuple(map(float, blocks)))


def _compute(device: str) -> dict[str, Rate]:
    size, side, dtype = (64 << 20, 1024, torch.float32) if device == "cpu" else (1 << 30, 8192, torch.bfloat16)
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    square = torch.ones(side, side, dtype=dtype, device=device)
    return {"bandwidth": _time(size, data.sum), "flops": _time(2 * side**3, lambda: square @ square)}


def _link(source: str, target: str) -> Rate:
    data = torch.ones(BLOCKS[-1], dtype=torch.uint8, device=source)
    data = data.pin_memory() if source == "cpu" else data
    copy = torch.empty_like(data, device=target)
    return _curve({size: _time(size, partial(copy[:size].copy_, data[:size])) for size in BLOCKS})


def _drive(folder: Path) -> dict[str, Rate]:
    """Scattered blocks at high queue depth and at queue depth 1, in requests of at most MAX_READ, as in a run."""
    whole, rates = aligned(BLOCKS[-1]), {"write": {}, "read": {}, "read_one": {}}
    for name, engine, threads in (("read", "auto", 16), ("read_one", "threads", 1)):
        with closing(BlockFile(folder, threads, engine)) as file:
            base = file.allocate(len(whole))
            for block in reversed(BLOCKS):  # the largest first: reading an unwritten range costs nothing
                step = min(block, MAX_READ)
                places = range(0, len(whole), max(block, len(whole) // 256))
                jobs = [(base + at, whole[at : at + step]) for p in places for at in range(p, p + block, step)]
                for verb, number in (("write", "write"), ("read", name)):
                    rate = _time(len(jobs) * step, partial(file.transfer, verb, jobs, 0, 0), 3)
                    rates[number].setdefault(block, rate)
    return {number: _curve(measured) for number, measured in rates.items()}
