"""Decode steps of a recorded run: the spans of each thread and their exclusive time."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from hillinfer.run import Run
from hillinfer.systems.shapes import ModelShape
from hillinfer.timeline import Span, Timeline

DRIVE_COMPUTE = ("evaluate", "inside")  # computed in the drive, concurrently with the host
ROUND = ("draft", "verify")  # spans around the steps of exact decoding: its drafts are replayed
PREFETCHED = ("prefetch", "near")  # loaded before it is needed, from the drive or from memory


@dataclass(frozen=True)
class RunSummary:
    """Contents of `Timeline.about`, as written by `describe`."""

    system: str
    shape: ModelShape
    batch: int
    cached: float  # tokens, mean over layers and steps
    attended: float
    pool: float  # share of the cached tokens in the host's pool; 1 without a drive
    drive: float  # share of the attended tokens that came from the drive


def describe(run: Run, shape: ModelShape, system: str) -> dict:
    """Context of a run, for `Timeline.about`: everything a replay needs beside the spans."""
    total, rows = run.counters.total, max(1, len(run.counters.rows or []))
    cached, batch = total("cached") / rows, run.batch
    pool = run.pool_tokens(round(cached)) / max(1, cached) if run.drive is not None else 1.0
    attended, drive = total("attended") / rows / batch / run.heads, total("drive") / max(1, total("queries"))
    about = dict(batch=batch, cached=cached, attended=attended, pool=min(1.0, pool), drive=drive)
    return {"system": system, "shape": asdict(shape), **about}


def read_summary(timeline: Timeline) -> RunSummary:
    """The context of a recorded run. ValueError if the timeline has none."""
    try:
        about = dict(timeline.about)
        return RunSummary(shape=ModelShape(**about.pop("shape")), **about)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this trace does not say what was run ({error}); record one with: run --trace") from None


@dataclass(slots=True)
class RecordedStep:
    """One decode step: its spans by thread in the order they ended, and its measured seconds (None for the last)."""

    number: int
    main: str
    threads: dict[str, list[Span]]
    seconds: float | None = None
    other: float = 0.0  # seconds of the main thread that no span covers


def decode_steps(timeline: Timeline) -> list[RecordedStep]:
    """The steps of one token each. The dense span of layer 0, which lies between two steps, becomes the `head`."""
    attends = [span for span in timeline.spans if span.kind == "attend"]
    if not attends:
        raise ValueError("no decode step was recorded")
    main, numbers = attends[0].thread, sorted({span.step for span in attends})
    steps = {number: RecordedStep(number, main, defaultdict(list)) for number in numbers}
    for span in sorted(timeline.spans, key=lambda span: (span.end_ns, -span.start_ns)):
        if span.step in steps and span.kind not in ROUND:
            if span.kind == "dense" and span.layer == 0:
                span = replace(span, kind="head")
            if span.kind == "attend" and span.lane == "drive":
                span = replace(span, kind="inside")
            steps[span.step].threads[span.thread].append(span)
    for step in steps.values():
        _split_background(step)
        spans = sorted(step.threads[main], key=lambda span: span.start_ns)
        if spans and spans[-1].kind == "head":
            step.seconds = (spans[-1].end_ns - spans[0].start_ns) / 1e9
            step.other = step.seconds - sum(took for _, took in exclusive_seconds(spans))
    return list(steps.values())


def _split_background(step: RecordedStep) -> None:
    """Move spans that began before the layer that reports them to background threads: loaders did that work."""
    begins = {}
    for span in sorted(step.threads[step.main], key=lambda span: -span.start_ns):  # the earliest of a layer stays
        if span.lane == "cpu" and span.kind not in ("dense", "head", *PREFETCHED):
            begins[span.layer] = span.start_ns
    stays = []
    for span in step.threads[step.main]:
        early = span.start_ns < begins.get(span.layer, 0) and span.kind not in ("dense", "head")
        (step.threads[f"background {span.lane}"] if early else stays).append(span)
    step.threads[step.main] = stays


def seconds_of(span: Span) -> float:
    return (span.end_ns - span.start_ns) / 1e9


def exclusive_seconds(spans: Iterable[Span]) -> list[tuple[Span, float]]:
    """Spans of one thread with their exclusive time, not covered by a later span. The sum is the thread's busy time.

    A loader's spans may overlap. Waiting time is attributed to the awaited work. A drive that scores runs concurrently
    with its caller: its span counts only while the caller waits in `merge`.
    """
    computed = [span for span in spans if span.kind in DRIVE_COMPUTE]
    out, active = [], []  # [span, seconds] each
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        if span.kind in DRIVE_COMPUTE:
            continue
        entry, at = [span, seconds_of(span)], span.start_ns
        active = [other for other in active if other[0].end_ns > at]
        if span.kind == "wait":
            until = max((other[0].end_ns for other in active), default=at)
            entry[1] -= (min(until, span.end_ns) - at) / 1e9
            active.insert(0, entry)
        else:
            for other in reversed(active):
                shared = max(0, min(other[0].end_ns, span.end_ns) - at)
                other[1], at = other[1] - shared / 1e9, at + shared
            active.append(entry)
        if span.kind == "merge":
            until = max((other.end_ns for other in computed if other.start_ns < span.end_ns), default=0)
            entry[1] -= max(0, min(until, span.end_ns) - span.start_ns) / 1e9
        out.append(entry)
    return [tuple(entry) for entry in out]


def size_of(kind: str, nbytes: float, summary: RunSummary) -> float:
    """The size that determines a kind's cost: its bytes; weights for dense work; else the cached tokens' codes."""
    if kind == "dense":
        return summary.shape.layer_weights * summary.shape.width
    if kind == "head":
        return summary.shape.head_weights * summary.shape.width
    return nbytes or summary.cached * summary.shape.code_bytes()
