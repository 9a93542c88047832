"""The record of a run: each device's work over time, and the tier that served each token."""

import json
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hillinfer import files

if TYPE_CHECKING:
    import pandas

LANES = ("gpu", "cpu", "drive", "link")
TIERS = ("device", "host", "drive")
AROUND = ("wait", "draft", "verify")  # spans without work of their own: a wait, and the halves of a round


@dataclass(slots=True)
class Span:
    """One piece of work, measured with the monotonic clock."""

    lane: str
    kind: str  # score, select, gather, read, prefetch, write, transfer, attend, append, dense, wait, draft, ...
    layer: int
    step: int
    start_ns: int
    end_ns: int
    bytes: int = 0
    detail: dict = field(default_factory=dict)
    thread: str = ""  # the recording thread: its spans are sequential


class Timeline:
    """Every span of a run, in the order of their ends. Nothing is dropped; `clear()` empties it.

    step    the current step; -1 before the first
    source  origin of the times: "measured", or "modelled: PROFILE"
    about   description of the run, for readers of the file (`recording.describe`)
    """

    def __init__(self):
        self.spans: list[Span] = []
        self.step, self.source, self.about = -1, "measured", {}

    def add(self, lane: str, kind: str, layer: int, step: int, start_ns: int, end_ns: int, nbytes=0, **detail) -> None:
        if lane not in LANES:
            raise ValueError(f"no lane '{lane}'; the lanes are {', '.join(LANES)}")
        thread = threading.current_thread().name
        self.spans.append(Span(lane, kind, layer, step, start_ns, end_ns, nbytes, detail, thread))

    def clear(self) -> None:
        self.spans.clear()

    def frame(self) -> "pandas.DataFrame":
        """One row per span, with its duration in ms."""
        import pandas as pd

        frame = pd.DataFrame([asdict(span) for span in self.spans], columns=list(Span.__slots__))
        return frame.assign(ms=(frame.end_ns - frame.start_ns) / 1e6)

    def busy_ms(self, *lanes: str) -> float:
        """Milliseconds in which at least one of these lanes (default: any) was busy; spans AROUND work do not count."""
        total = until = 0
        chosen = [s for s in self.spans if s.kind not in AROUND and (not lanes or s.lane in lanes)]
        for span in sorted(chosen, key=lambda s: s.start_ns):
            total += max(0, span.end_ns - max(span.start_ns, until))
            until = max(until, span.end_ns)
        return total / 1e6

    def overlap(self, one: tuple[str, ...] = ("cpu", "gpu"), other: tuple[str, ...] = ("drive", "link")) -> float:
        """Fraction of the shorter side's busy time that overlapped the other side's, 0 to 1."""
        shorter = min(self.busy_ms(*one), self.busy_ms(*other))
        both = self.busy_ms(*one) + self.busy_ms(*other) - self.busy_ms(*one, *other)
        return both / shorter if shorter else 0.0

    def chrome_trace(self) -> dict:
        """Chrome trace events, for Perfetto: a process per lane, and a sub-track for every overlapping span."""
        events, ends = [], defaultdict(list)  # lane -> end of the last span of each sub-track
        origin = min((span.start_ns for span in self.spans), default=0)
        for pid, lane in enumerate(LANES):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": lane}})
        for span in sorted(self.spans, key=lambda s: (s.start_ns, -s.end_ns)):
            tracks = ends[span.lane]
            tid = next((i for i, end in enumerate(tracks) if end <= span.start_ns), len(tracks))
            tracks[tid : tid + 1] = [span.end_ns]
            place = {"pid": LANES.index(span.lane), "tid": tid}
            times = {"ts": (span.start_ns - origin) / 1e3, "dur": (span.end_ns - span.start_ns) / 1e3}
            about = {"layer": span.layer, "step": span.step, "bytes": span.bytes, "thread": span.thread, **span.detail}
            events.append({"ph": "X", "name": span.kind, "cat": span.lane, **place, **times, "args": about})
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(times=self.source, about=self.about)}

    def save(self, path: str | Path) -> Path:
        """Write the Chrome trace as JSON."""
        return files.write_text(path, json.dumps(self.chrome_trace()))

    @classmethod
    def load(cls, path: str | Path) -> "Timeline":
        """A timeline from a file that `save` wrote; times start at the first span. ValueError or OSError otherwise."""
        timeline = cls()
        try:
            trace = json.loads(Path(path).read_text(encoding="utf-8"))
            timeline.source, timeline.about = (trace["otherData"][name] for name in ("times", "about"))
            for event in trace["traceEvents"]:
                if event["ph"] == "X":
                    detail = dict(event["args"])
                    own = [detail.pop(name) for name in ("layer", "step", "bytes", "thread")]
                    start, end = round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)
                    if not all(type(number) is int for number in (event["pid"], *own[:3])) or event["pid"] < 0:
                        raise TypeError("a span's numbers must be integers")
                    span = Span(LANES[event["pid"]], str(event["name"]), *own[:2], start, end, own[2], detail, own[3])
                    timeline.spans.append(span)
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError) as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(f"{path} is not a trace of this project ({why})") from None
        timeline.spans.sort(key=lambda span: span.end_ns)
        return timeline


class _Body:
    """The context manager of `Track.span`. A generator would take three times as long, several times a layer."""

    __slots__ = ("detail", "nbytes", "start", "timeline", "what")

    def __init__(self, timeline: Timeline, what: tuple[str, str, int, int], nbytes: int, detail: dict):
        self.timeline, self.what, self.nbytes, self.detail = timeline, what, nbytes, detail

    def __enter__(self) -> dict:
        self.start = time.perf_counter_ns()
        return self.detail

    def __exit__(self, *exc) -> None:
        end, thread = time.perf_counter_ns(), threading.current_thread().name
        self.timeline.spans.append(Span(*self.what, self.start, end, self.nbytes, self.detail, thread))


@dataclass(slots=True)
class Hits:
    """Hits of one layer in one step. Each of the `queries` selected tokens was served by exactly one tier."""

    step: int
    layer: int
    cached: int  # tokens in the cache
    queries: int
    attended: int  # queries without padding
    device: int
    host: int
    drive: int
    demoted: int  # of `drive`, tokens that the hot pool once held
    guessed: int  # tokens prefetched for this step
    prefetched: int  # of `drive`, tokens already prefetched
    swapped: int  # tokens promoted after the step, each in place of a demoted one
    fresh: int = 0  # of `drive`, tokens that no step had selected before


class Counters:
    """Hits per layer and step, over all sequences of the batch.

    rounds  drafted and accepted tokens of each round of exact decoding
    """

    def __init__(self):
        self.rows: list[Hits] = []
        self.rounds: list[tuple[int, int]] = []

    def clear(self) -> None:
        self.rows.clear()
        self.rounds.clear()

    def total(self, name: str) -> int:
        return sum(getattr(row, name) for row in self.rows)

    def rates(self) -> dict[str, float]:
        """Fraction of all queries served by each tier."""
        queries = self.total("queries")
        return {tier: self.total(tier) / queries if queries else 0.0 for tier in TIERS}

    def prefetch(self) -> tuple[float, float]:
        """Prefetch accuracy (used / prefetched) and coverage (prefetched / needed from the drive)."""
        used = self.total("prefetched")
        return used / max(1, self.total("guessed")), used / max(1, self.total("drive"))

    def frame(self) -> "pandas.DataFrame":
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=list(Hits.__slots__))


class Served(NamedTuple):
    """Tokens of one attention by the tier that served them, over all sequences of the batch."""

    device: int = 0
    host: int = 0
    drive: int = 0
    demoted: int = 0  # of `drive`, tokens that the hot pool once held; the rest never were in it
    guessed: int = 0  # tokens prefetched for this step
    prefetched: int = 0  # of `drive`, tokens that the prefetch had read
    fresh: int = 0  # of `drive`, tokens that no step had selected before

    def __add__(self, other: "Served") -> "Served":
        return Served(*map(add, self, other))


class Track:
    """One layer's view of the record: adds spans and hits under its number and the current step."""

    def __init__(self, timeline: Timeline, counters: Counters, layer: int):
        self.timeline, self.counters, self.layer = timeline, counters, layer
        self.away = False  # the model is on another device: what a store calls its device is the host

    def span(self, lane: str, kind: str, nbytes: int = 0) -> _Body:
        """A context manager that records its body as a span, also if it raises. Yields the span's `detail` dict."""
        return _Body(self.timeline, (lane, kind, self.layer, self.timeline.step), nbytes, {})

    def add(self, lane: str, kind: str, start_ns: int, nbytes: int = 0, end_ns: int | None = None) -> int:
        """A span from `start_ns` until now, or until `end_ns`. Returns its end."""
        end_ns = time.perf_counter_ns() if end_ns is None else end_ns
        self.timeline.add(lane, kind, self.layer, self.timeline.step, start_ns, end_ns, nbytes)
        return end_ns

    def count(self, cached: int, attended: int, served: Served, swapped: int, step: int | None = None) -> None:
        step, queries = self.timeline.step if step is None else step, sum(served[: len(TIERS)])
        if self.away:
            served = served._replace(device=0, host=served.device + served.host)
        *tiers, fresh = served
        self.counters.rows.append(Hits(step, self.layer, cached, queries, int(attended), *tiers, swapped, fresh))
