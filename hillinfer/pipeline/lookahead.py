"""Work for the next layer while this one computes (HillInfer APP, section 1.4)."""

import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

TRIAL_STEPS = 5  # of each way; the first is not counted
# Fractions of a guess to try. All of it covers most of the demand but reads over a third more than is used, too much if
# the drive is the bottleneck; of the most confident part four fifths are used (docs/experiments.md).
AHEAD = (True, 0.6, False)


class Trial:
    """Chooses the fastest of several ways by trying each at the start (as DUAL-BLADE does with its pipelines)."""

    def __init__(self, setting: bool | float | str, ways: tuple = (True, False)):
        self.on = ways[0] if setting == "auto" else setting
        self.times: dict[bool | float, list[float]] | None = {way: [] for way in ways} if setting == "auto" else None
        self.medians: dict[bool | float, float] = {}  # seconds per step of each way, once all were tried
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
            self.on = min(reversed(self.medians), key=self.medians.get)  # a tie: less work
            self.times = None

    def pause(self) -> None:
        """Exclude the time until the next step: it is not a decode step's."""
        self._began = None


class Lookahead:
    """Two threads, one that selects and one that reads, so that selection never waits for the drive."""

    def __init__(self):
        self._selector = ThreadPoolExecutor(1, "hillinfer-select")
        self.reader = ThreadPoolExecutor(1, "hillinfer-read")

    def submit(self, work: Callable[[], None]) -> Future:
        """Run a selection in the background; it submits its reads to `reader`."""

        def run() -> None:
            with torch.inference_mode():
                work()

        return self._selector.submit(run)

    def close(self) -> None:
        self._selector.shutdown(wait=True, cancel_futures=True)
        self.reader.shutdown(wait=True, cancel_futures=True)
