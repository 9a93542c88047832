"""Work for the next layer while this one computes (HillInfer APP, section 1.4)."""

import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

TRIAL_STEPS = 5  # of each way; the first of each is not counted
# Shares of a guess that are tried: all of it brings most of what is missing and reads over a third more than is used,
# which a drive that is the longest lane cannot spare; of its surest part four fifths are used (docs/experiments.md).
AHEAD = (True, 0.6, False)


class Trial:
    """Chooses the fastest of some ways by trying each, in turn, at the start (as DUAL-BLADE does with pipelines)."""

    def __init__(self, setting: bool | float | str, ways: tuple = (True, False)):
        self.on = ways[0] if setting == "auto" else setting
        self.times: dict[bool | float, list[float]] | None = {way: [] for way in ways} if setting == "auto" else None
        self.medians: dict[bool | float, float] = {}  # seconds of a step each way, once all were tried
        self._began: float | None = None

    def step(self, now: float) -> None:
        """A decode step begins at `now` seconds."""
        if self.times is None:
            return
        if self._began is not None:
            self.times[self.on].append(now - self._began)
        self._began = now
        if len(self.times[self.on]) < TRIAL_STEPS:
            return
        untried = [way for way, times in self.times.items() if not times]
        if untried:
            self.on = untried[0]
        else:
            self.medians = {way: statistics.median(times[1:]) for way, times in self.times.items()}
            self.on, self.times = min(reversed(self.medians), key=self.medians.get), None  # a tie: what does less

    def pause(self) -> None:
        """What comes next is no decode step: its time tells nothing."""
        self._began = None


@dataclass(frozen=True)
class Ahead:
    """One sequence's part of a guess: sorted positions (k,); how to get records (m, 2, Hkv, D) and which of them are
    theirs (None: all in order).
    """

    positions: np.ndarray
    records: Callable[[], tuple[torch.Tensor, np.ndarray | None]]


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
