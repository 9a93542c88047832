"""Measure what this machine's host and drive do: the four speeds that the balance needs, in under a minute."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hillinfer.evaluator.codes import group_scores
from hillinfer.systems.hillinfer.balance import Speeds
from hillinfer.systems.hillinfer.drive import EmulatedDrive
from hillinfer.systems.hillinfer.protocol import Emulation, Shape

TOKENS, HEADS, GROUP, DIM = 16_384, 8, 4, 128  # one layer of a Llama-3-8B, 16K tokens: 64 MiB of records in bf16
CHOSEN = 0.1  # share of the tokens that is moved
REPEATS = 5


def measure(folder: Path, paced: bool = False) -> tuple[Speeds, list[str]]:
    """The speeds, medians of five, and a line for each with its spread. `paced`: at a SmartSSD's rates."""
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(-127, 128, (HEADS, TOKENS, DIM), np.int8))
    query = torch.from_numpy(rng.integers(-127, 128, (HEADS, GROUP, DIM), np.int8))
    records = torch.from_numpy(rng.integers(0, 255, (TOKENS, 2 * HEADS * DIM * 2), np.uint8))
    chosen = np.sort(rng.choice(TOKENS, int(CHOSEN * TOKENS), replace=False))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(1, 1, records.shape[1], HEADS, DIM)
    drive = EmulatedDrive(folder, shape, Emulation(paced=paced))
    try:
        drive.write(0, 0, records.numpy(), codes.numpy())
        drive.hold(0, np.arange(TOKENS), False)
        drive.report()  # waits for the writes
        moved = len(chosen) * records.shape[1]
        index = torch.from_numpy(chosen)
        tries = {
            "fc": (codes.nbytes, lambda: group_scores(query, codes)),
            "fs": (codes.nbytes, lambda: list(drive.evaluate(0, query.numpy()))),
            "bc": (moved, lambda: _finish(records.index_select(0, index).to(device))),
            "bs": (moved, lambda: _finish(torch.from_numpy(drive.fetch(0, chosen)).to(device))),
        }
        rates = {name: _rates(nbytes, work) for name, (nbytes, work) in tries.items()}
    finally:
        drive.close()
    what = {
        "fc": "host scores codes",
        "fs": "drive scores codes",
        "bc": "host gathers records",
        "bs": "drive fetches them",
    }
    facts = [
        f"{name}: {what[name]}, {statistics.median(own) / 1e9:.2f} GB/s ({min(own) / 1e9:.2f} to {max(own) / 1e9:.2f})"
        for name, own in rates.items()
    ]
    return Speeds(**{name: statistics.median(own) for name, own in rates.items()}), facts


def _finish(moved: torch.Tensor) -> None:
    if moved.is_cuda:
        torch.cuda.synchronize()


def _rates(nbytes: int, work: Callable) -> list[float]:
    work()  # the first touch of buffers is no part of the speed
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        rates.append(nbytes / (time.perf_counter() - start))
    return rates
