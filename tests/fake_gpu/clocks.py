"""Streams, events and what is known to have ended: vector clocks, as race detectors keep them.

A clock maps a stream's number to the last of its ticks that is known to be over. The host has a clock for each thread.
"""

import itertools
import threading
import time
from dataclasses import dataclass, field

_local = threading.local()
gpu = None  # the `FakeGpu` in use
numbers = itertools.count(1)


class Clock(dict):
    def merge(self, other: dict) -> None:
        for stream, tick in other.items():
            self[stream] = max(tick, self.get(stream, 0))

    def covers(self, stream: "Stream", tick: int) -> bool:
        return self.get(stream.id, 0) >= tick


def host() -> Clock:
    """What this thread knows to be over. Handed on with what is submitted to a pool, and back with its result."""
    if not hasattr(_local, "host"):
        _local.host = Clock()
    return _local.host


def current() -> "Stream":
    return getattr(_local, "stream", None) or gpu.default


@dataclass
class Copy:
    """A copy that the host did not wait for. `land` moves the bytes, `check` looks whether its source is as it was."""

    tick: int
    down: bool
    land: object
    check: object = None


@dataclass(eq=False)
class Stream:
    """A queue of copies that have not landed yet, and a clock."""

    device: object = None
    priority: int = 0
    id: int = field(default_factory=lambda: next(numbers))

    def __post_init__(self):
        self.clock, self.copies = Clock(), []

    def tick(self) -> int:
        """Something is launched, by a host that knows so much."""
        self.clock.merge(host())
        self.clock[self.id] = self.clock.get(self.id, 0) + 1
        return self.clock[self.id]

    def land(self, upto: int | None = None) -> None:
        """Copies to the device up to a tick arrive: work on the device that is ordered after them goes on."""
        for copy in self.copies:
            if copy.land and not copy.down and (upto is None or copy.tick <= upto):
                copy.land()
                copy.land = None

    def over(self, upto: int | None = None) -> None:
        """The host waited: copies up to a tick are over in both directions."""
        done = [copy for copy in self.copies if upto is None or copy.tick <= upto]
        self.copies = [copy for copy in self.copies if copy not in done]
        for copy in done:
            if copy.land:
                copy.land()
            if copy.check:
                copy.check()

    def synchronize(self) -> None:
        known = host().covers(self, self.clock.get(self.id, 0))
        self.over()
        host().merge(self.clock)
        if not known:
            gpu.note("sync", "stream.synchronize", 0)

    def query(self) -> bool:
        return True

    def wait_event(self, event: "Event") -> None:
        if event.stream is not None:
            event.stream.land(event.at)
        self.clock.merge(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        other.land()
        self.clock.merge(other.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self):
        self._before = getattr(_local, "stream", None)
        _local.stream = self
        return self

    def __exit__(self, *_):
        _local.stream = self._before


class Event:
    def __init__(self, *_, **__):
        self.clock, self.stream, self.at, self.ns = Clock(), None, 0, 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current()
        self.at, self.ns = self.stream.tick(), time.perf_counter_ns()
        self.clock = Clock(self.stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        if self.stream is None:
            return
        known = host().covers(self.stream, self.at)
        self.stream.over(self.at)
        host().merge(self.clock)
        if not known:
            gpu.note("sync", "event.synchronize", 0)

    def query(self) -> bool:
        """Only what the host has waited for is sure to be over."""
        return self.stream is None or host().covers(self.stream, self.at)

    def elapsed_time(self, other: "Event") -> float:
        if not (self.query() and other.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (other.ns - self.ns) / 1e6


class Block:
    """One allocation of device memory: who used which bytes of it."""

    def __init__(self, owner: Stream):
        self.owner, self.uses, self.recorded = owner, [], set()

    def use(self, span: tuple[int, int], stream: Stream, tick: int, write: bool, where: str) -> None:
        low, high = span
        for a, b, other, then, wrote, place in self.uses:
            if other is stream or b <= low or a >= high or not (write or wrote) or stream.clock.covers(other, then):
                continue
            kinds = [("read", "write")[was] for was in (write, wrote)]
            gpu.hazard("race", f"{kinds[0]} at {where} is not ordered after the {kinds[1]} at {place}")
        kept = [u for u in self.uses if not (u[2] is stream and u[4] <= write and low <= u[0] and u[1] <= high)]
        self.uses = kept[-63:] + [(low, high, stream, tick, write, where)]

    def __del__(self):
        for _, _, stream, tick, _, where in self.uses if gpu is not None else ():
            ordered = self.owner.clock.covers(stream, tick) or host().covers(stream, tick)
            if stream is not self.owner and stream not in self.recorded and not ordered:
                gpu.hazard("free", f"memory was freed while another stream may use it ({where}); no record_stream")
