"""Work for the next layer while this one computes (HillInfer APP, section 1.4)."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Ahead:
    """One sequence's part of a guess: sorted positions (k,), and how to get their records (k, 2, Hkv, D)."""

    positions: np.ndarray
    records: Callable[[], torch.Tensor]


class Guess:
    """A selection in the making, and then the reads it asks for."""

    def __init__(self, selection: Future):
        self._selection = selection  # of (positions of each row, future of their records)

    def chosen(self) -> list[np.ndarray]:
        """Wait for the selection: the positions to prefetch, for each row. Raises what its thread raised."""
        return self._selection.result()[0]

    def rows(self, n: int) -> list[Ahead]:
        positions, reading = self._selection.result()
        return [Ahead(positions[row], lambda row=row: reading.result()[row]) for row in range(n)]


class Lookahead:
    """Two threads: one selects, one reads, so that a selection never waits for the drive."""

    def __init__(self):
        self._select = ThreadPoolExecutor(1, "hillinfer-select")
        self._read = ThreadPoolExecutor(1, "hillinfer-read")

    def submit(self, choose: Callable[[], list[np.ndarray]], read: Callable[[list[np.ndarray]], list]) -> Guess:
        """Run `choose`, then `read` on what it chose."""

        def work():
            with torch.inference_mode():
                positions = choose()
            return positions, self._read.submit(read, positions)

        return Guess(self._select.submit(work))

    def close(self) -> None:
        self._select.shutdown(wait=True, cancel_futures=True)
        self._read.shutdown(wait=True, cancel_futures=True)
