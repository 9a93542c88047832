"""What a GPU has yet to say: when its work began and ended, and counts that depend on its data.

The host asks without a wait and is told a step later, by events; all is known once the record is asked for or the run
ends.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from hillinfer.timeline import Served, Span, Track


class Later:
    """Jobs of one run that wait for events on a device, in their order.

    attended  an event at the end of a layer's last attention in a decode step
    """

    def __init__(self, device: torch.device):
        self.device, self.jobs, self.lock, self.attended = device, deque(), threading.Lock(), None
        self.room: int | None = None  # bytes for key codes whose records are in host memory
        self.base = self.mark()  # both clocks, once
        self.base.synchronize()
        self.base_ns = time.perf_counter_ns()

    def __deepcopy__(self, memo: dict) -> "Later":
        return Later(self.device)

    def mark(self) -> torch.Event:
        """An event now on the stream."""
        event = torch.Event(self.device, enable_timing=True)
        torch.accelerator.current_stream(self.device).record_event(event)
        return event

    def add(self, event: torch.Event, job: Callable[[], None]) -> None:
        self.jobs.append((event, job))

    def settle(self, wait: bool = True) -> None:
        """Do the jobs whose events have passed, or all of them."""
        with self.lock:
            event = None
            while self.jobs and (wait or self.jobs[0][0].query()):
                event, job = self.jobs.popleft()
                event.synchronize()
                job()
            if event is not None:  # a time from far back would be rounded: events count ms in fp32
                self.base, self.base_ns = event, self.time(event)

    close = settle

    def time(self, event: torch.Event) -> int:
        """Of an event that has passed, by time.perf_counter_ns."""
        return self.base_ns + round(1e6 * self.base.elapsed_time(event))


class DeviceTrack(Track):
    """A `Track` whose spans on the GPU are the GPU's own times, not those of launches."""

    def __init__(self, track: Track, later: Later):
        super().__init__(track.timeline, track.counters, track.layer)
        self.later = later

    def span(self, lane: str, kind: str, nbytes: int = 0):
        return self._timed(kind, nbytes) if lane == "gpu" else super().span(lane, kind, nbytes)

    @contextmanager
    def _timed(self, kind: str, nbytes: int) -> Iterator[dict]:
        start, detail = self.later.mark(), {}
        yield detail
        self.since(start, kind, nbytes, detail)

    def since(self, start: torch.Event, kind: str, nbytes: int = 0, detail: dict | None = None) -> None:
        """A span of the GPU from an event until what has been launched is done."""
        end, own = self.later.mark(), (kind, self.layer, self.timeline.step)
        rest = nbytes, detail or {}, threading.current_thread().name

        def job() -> None:
            self.timeline.spans.append(Span("gpu", *own, self.later.time(start), self.later.time(end), *rest))

        self.later.add(end, job)

    def count(self, cached: int, attended, served: Served, swapped: int, step: int | None = None) -> None:
        if self.away:
            return super().count(cached, attended, served, swapped, step)
        attended, device = (
            number.to("cpu", non_blocking=True) if torch.is_tensor(number) else number
            for number in (attended, served.device)
        )

        def job(step: int) -> None:
            super(DeviceTrack, self).count(cached, int(attended), served._replace(device=int(device)), swapped, step)

        self.later.add(self.later.mark(), partial(job, self.timeline.step))
