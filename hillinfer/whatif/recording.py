"""What a recorded run says of itself: its decode steps, what each thread did in them, and how long that took alone."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from hillinfer.run import Run
from hillinfer.systems.shapes import ModelShape
from hillinfer.timeline import Span, Timeline

BESIDE = ("evaluate", "inside")  # what a drive computes while the host does
AHEAD = ("prefetch", "near")  # what a loader brings before it is asked for: from the drive, from memory


@dataclass(frozen=True)
class Recorded:
    """What `describe` noted, read back from `Timeline.about`."""

    system: str
    shape: ModelShape
    batch: int
    cached: float  # tokens, mean of each layer and step
    attended: float
    pool: float  # share of the cached tokens that the host's pool held; 1 where nothing is on a drive
    drive: float  # share of the attended tokens that came from the drive


def describe(run: Run, shape: ModelShape, system: str) -> dict:
    """What a replay needs to know of a run beside its spans, for `Timeline.about`."""
    rows = run.counters.rows or []
    cached = run.counters.total("cached") / max(1, len(rows))
    batch = run.geometry.batch if run.geometry else 1
    pool = run.pool_tokens(round(cached)) / max(1, cached) if run.drive is not None else 1.0
    queries = max(1, run.counters.total("queries"))
    about = dict(
        batch=batch,
        cached=cached,
        attended=run.counters.total("attended") / max(1, len(rows)) / batch,
        pool=min(1.0, pool),
        drive=run.counters.total("drive") / queries,
    )
    return {"system": system, "shape": asdict(shape), **about}


def recorded(timeline: Timeline) -> Recorded:
    """ValueError where the timeline does not say what it recorded, or has no decode step."""
    try:
        about = dict(timeline.about)
        return Recorded(shape=ModelShape(**about.pop("shape")), **about)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this trace does not say what was run ({error}); record one with: run --trace") from None


@dataclass(slots=True)
class Step:
    """One decode step: its spans by thread in the order they ended, and its measured seconds (None for the last)."""

    number: int
    main: str
    threads: dict[str, list[Span]]
    seconds: float | None = None
    other: float = 0.0  # seconds in which the main thread did what no span covers


def decode_steps(timeline: Timeline) -> list[Step]:
    """The steps of one token each. What lies between two steps (the dense span of layer 0) is called `head`."""
    main = next((span.thread for span in timeline.spans if span.kind == "attend"), None)
    numbers = {span.step for span in timeline.spans if span.kind == "attend"}
    steps = {number: Step(number, main, defaultdict(list)) for number in sorted(numbers)}
    for span in sorted(timeline.spans, key=lambda span: (span.end_ns, -span.start_ns)):
        if span.step in steps:
            if span.kind == "dense" and span.layer == 0:
                span = replace(span, kind="head")
            if span.kind == "attend" and span.lane == "drive":
                span = replace(span, kind="inside")
            steps[span.step].threads[span.thread].append(span)
    for step in steps.values():
        _set_beside(step)
        own = sorted(step.threads[main], key=lambda span: span.start_ns)
        if own and own[-1].kind == "head":
            start, end = own[0].start_ns, own[-1].end_ns
            step.seconds = (end - start) / 1e9
            step.other = step.seconds - sum(took for span, took in own_seconds(own))
    if not steps:
        raise ValueError("no decode step was recorded")
    return list(steps.values())


def _set_beside(step: Step) -> None:
    """Work that a layer reports, but that began before the layer did, was done beside the main thread: by a loader."""
    begins = {}
    for span in step.threads[step.main]:
        if span.lane == "cpu" and span.kind not in ("dense", "head", *AHEAD):
            begins[span.layer] = min(span.start_ns, begins.get(span.layer, span.start_ns))
    stays = []
    for span in step.threads[step.main]:
        early = span.start_ns < begins.get(span.layer, 0) and span.kind not in ("dense", "head")
        (step.threads[f"beside {span.lane}"] if early else stays).append(span)
    step.threads[step.main] = stays


def own_seconds(spans: Iterable[Span]) -> list[tuple[Span, float]]:
    """Spans of one thread with the seconds that they and no later span took: together, the time with any of them.

    A loader's spans may overlap. What is waited for took the time, and not the wait. A drive that scores works beside
    the thread that asked it: its span counts only where that thread waited for it.
    """
    beside = [span for span in spans if span.kind in BESIDE]
    out, active = [], []
    for span in sorted((s for s in spans if s.kind not in BESIDE), key=lambda s: (s.start_ns, -s.end_ns)):
        entry, at = [span, (span.end_ns - span.start_ns) / 1e9], span.start_ns
        active = [own for own in active if own[0].end_ns > at]
        if span.kind == "wait":
            until = max((own[0].end_ns for own in active), default=at)
            entry[1] -= (min(until, span.end_ns) - at) / 1e9
            active.insert(0, entry)
        else:
            for own in reversed(active):
                shared = max(0, min(own[0].end_ns, span.end_ns) - at)
                own[1], at = own[1] - shared / 1e9, at + shared
            active.append(entry)
        out.append(entry)
    for span, entry in ((e[0], e) for e in out if e[0].kind == "merge"):
        waited = [drive.end_ns for drive in beside if drive.start_ns < span.end_ns and drive.end_ns > span.start_ns]
        entry[1] -= max(0, min(max(waited, default=0), span.end_ns) - span.start_ns) / 1e9 if waited else 0.0
    return [(span, took) for span, took in out]


def size_of(span_kind: str, nbytes: float, about: Recorded) -> float:
    """What a kind's cost grows with: its bytes; the model's weights for its own work; else the cached tokens' codes."""
    if span_kind == "dense":
        return about.shape.layer_weights * about.shape.width
    if span_kind == "head":
        return about.shape.head_weights * about.shape.width
    return nbytes or about.cached * about.shape.code_bytes()
