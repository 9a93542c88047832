"""A recorded run on other hardware or at another size: its spans as tasks, re-timed by the engine.

Order and dependencies come from the run, so a change in the pipeline changes its replay. Recorded durations are
ignored; only the work of each span counts. Its size scales to a `Target` by kind:

    score, evaluate, abstract, select, guess, other cached tokens x batch x bytes of a token's codes
    gather, near, read, prefetch, attend, swap ...  attended tokens x batch x bytes of a token's record; a smaller share
                                                    of tokens in the pool turns gathers into reads
    append, encode, write                           batch x bytes of a token's record
    dense, head                                     parameters; operations also by the batch
    layers                                          the first from the first; the rest spread over the recorded ones
"""

import bisect
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from hillinfer.systems.hillinfer.profile import Profile
from hillinfer.systems.shapes import ModelShape
from hillinfer.tiers.block_file import BLOCK
from hillinfer.timeline import Span, Timeline
from hillinfer.whatif import costs
from hillinfer.whatif.engine import Task, play, schedule
from hillinfer.whatif.recording import DRIVE_COMPUTE, RecordedStep, RunSummary, decode_steps, read_summary, size_of
from hillinfer.whatif.scenario import HOST_USABLE

CACHED = ("score", "evaluate", "inside", "merge", "select", "guess", "other", "view", "abstract")
ATTENDED = ("gather", "near", "read", "prefetch", "transfer", "attend", "swap")
PER_ROW = (*CACHED, *ATTENDED)  # one call for each sequence of a batch
FROM_DRIVE = ("read", "prefetch")
WAITS_FOR = {"append": "guess", "wait": "prefetch", "prefetch": "guess"}  # across threads (`Layer.append`, `fetch`)
JOINS_DRIVE = ("merge", "select", "guess", "wait")  # where a thread waits for the drive's computation


@dataclass(frozen=True)
class Target:
    """The size to scale a run to; None keeps the recorded value."""

    shape: ModelShape | None = None
    context: int | None = None
    batch: int | None = None
    alpha: float | None = None


def to_tasks(timeline: Timeline, profile: Profile, target: Target | None = None, most: int = 8) -> list[Task]:
    """The last `most` decode steps as tasks, scaled to the target and timed by the profile.

    The work of one thread stays in order. Concurrent with it: a drive's evaluation, from the start of its span until
    its thread merges; another thread's work for a layer, from the main thread's position at its start. The main thread
    waits for a guess before it changes the guess's inputs, and for a prefetch before it uses the data.
    """
    scaling = Scaling(read_summary(timeline), target or Target(), profile)
    steps, tasks, last = decode_steps(timeline), [], None
    for number, step in enumerate(steps[-most - 1 : -1] or steps):
        last = _add_step(tasks, step, number, scaling, last)
    return tasks


def _add_step(tasks: list[Task], step: RecordedStep, number: int, scaling: "Scaling", last: int | None) -> int:
    """Append the tasks of one step, after the main thread's `last` task. Returns the main thread's new last task."""
    old, new = scaling.summary.shape.layers, scaling.shape.layers
    by_layer: dict[str, dict[int, list[Span]]] = {thread: defaultdict(list) for thread in step.threads}
    for thread, spans in step.threads.items():
        for span in spans:
            by_layer[thread][old if span.kind == "head" else span.layer].append(span)
    main = step.threads[step.main]
    place = {id(span): (layer, i) for layer, spans in by_layer[step.main].items() for i, span in enumerate(spans)}
    first = {thread: min(span.start_ns for span in spans) for thread, spans in step.threads.items()}
    latest = {step.main: last}  # thread -> its last task
    made: dict[tuple[int, int], int] = {}  # place of a span of the main thread -> its task

    def origin(span: Span, layer: int, source: int) -> int | None:
        """The main thread's last task before this span began, shifted to the target layer."""
        for spans, places, done in ((main, place, made), *([scaling.previous] if scaling.previous else [])):
            index = bisect.bisect_right(spans, span.start_ns, key=lambda other: other.end_ns) - 1
            if index >= 0:
                of, i = places[id(spans[index])]
                return done.get((of + (layer - source if spans is main else 0), i), last)
        return last

    for layer in range(new + 1):
        source = old if layer == new else layer and 1 + (layer - 1) * (old - 1) // max(1, new - 1)
        ready: dict[str, list[int]] = defaultdict(list)  # kind -> tasks of this layer that others wait for
        for thread in sorted(by_layer, key=lambda name: (name == step.main, first[name])):  # a guess, then its reads
            background = thread.startswith("background")
            for i, span in enumerate(by_layer[thread][source]):
                in_drive, waits = span.kind in DRIVE_COMPUTE, WAITS_FOR.get(span.kind)
                after = [latest.get(thread)]
                if thread == step.main and in_drive:
                    after = [origin(span, layer, source)]
                elif thread != step.main and i == 0 and (background or not waits):
                    after.append(origin(span, layer, source))
                after += ready[waits] if waits else []
                if background or span.kind in ("wait", "attend"):
                    after += ready["background"]
                if span.kind in JOINS_DRIVE:
                    after += [index for kind in DRIVE_COMPUTE for index in ready.pop(kind, [])]
                for part in [*(scaling.before_attend(span) if span.kind == "attend" else []), span]:
                    known = tuple(sorted({index for index in after if index is not None}))
                    tasks.append(scaling.task(part, layer, number, known))
                    after = [len(tasks) - 1]
                ready["background" if background else span.kind] += after
                if not in_drive:
                    latest[thread] = after[0]
                if thread == step.main:
                    made[layer, i] = made.get((layer, i - 1), last) if in_drive else after[0]
    scaling.previous = (main, place, made)
    return latest[step.main]


class Scaling:
    """Converts recorded sizes to sizes at the target, and to seconds on the profile."""

    def __init__(self, summary: RunSummary, target: Target, profile: Profile):
        self.summary, self.profile = summary, profile
        self.previous: tuple | None = None  # the main thread's spans of the step before, their places and tasks
        old, new = summary.shape, target.shape or summary.shape
        self.shape, self.batch, self.cached = new, target.batch or summary.batch, target.context or summary.cached
        rows, record = self.batch / summary.batch, new.record_bytes / old.record_bytes
        share = summary.attended / summary.cached
        alpha = share if target.alpha is None or share > 0.999 else target.alpha
        kv = new.kv_bytes(round(self.cached), self.batch)
        self.pool = min(summary.pool, profile.get("cpu.memory") * HOST_USABLE / kv)
        # Linear from all (an empty pool) to the recorded share at the recorded pool. Recorded pools are ranked, so this
        # is exact for a pool reduced at random: an upper bound.
        miss = 1 - (1 - summary.drive) * self.pool / summary.pool if summary.pool else summary.drive
        attended = alpha * self.cached / summary.attended * rows * record
        self.factors = dict.fromkeys(ATTENDED, attended)
        self.factors |= dict.fromkeys(FROM_DRIVE, attended * (miss / summary.drive if summary.drive else 1.0))
        self.factors["gather"] = attended * ((1 - miss) / (1 - summary.drive) if summary.drive < 1 else 1.0)
        cached = self.cached / summary.cached * rows * new.code_bytes() / old.code_bytes()
        self.factors |= dict.fromkeys(CACHED, cached)
        self.new_factor = rows * record  # for kinds that scale with the new tokens
        fits = profile.has("gpu") and kv + new.weight_bytes < profile.get("gpu.memory")
        self.crosses = profile.has("gpu") and not (summary.pool == 1 and fits)

    def task(self, span: Span, layer: int, step: int, after: tuple[int, ...]) -> Task:
        profile, shape, kind, flops = self.profile, self.shape, span.kind, 0.0
        if kind in ("dense", "head"):
            weights = shape.layer_weights if kind == "dense" else shape.head_weights
            size, flops = shape.width * weights, 2.0 * weights * self.batch
        else:
            size = size_of(kind, span.bytes, self.summary) * self.factors.get(kind, self.new_factor)
        if kind in ("select", "guess") and not profile.kinds:
            size *= 4 / shape.head_dim  # it reads a score in place of a key's code
        if kind == "attend":
            flops = 4 * size / shape.record_bytes * shape.heads * shape.head_dim
        calls = max(1, round(self.batch / self.summary.batch)) if kind in PER_ROW and kind != "attend" else 1
        block = math.ceil(shape.record_bytes / BLOCK) * BLOCK if kind in FROM_DRIVE else math.inf
        lane = costs.lane_of(profile, span.lane, kind)
        how = dict(block=block, flops=flops, calls=calls, system=self.summary.system)
        moved = round(size) if span.bytes else 0
        return Task(lane, kind, layer, step, costs.seconds(profile, lane, kind, size, **how), moved, after)

    def before_attend(self, attend: Span) -> list[Span]:
        """Work without a recorded span: the overhead between spans, and the copy to a GPU if the run had none."""
        extra = [Span("cpu", "other", attend.layer, attend.step, 0, 0)]
        if self.crosses:
            extra.append(Span("link", "transfer", attend.layer, attend.step, 0, 0, attend.bytes))
        return extra


def replay(timeline: Timeline, profile: Profile, target: Target | None = None, most: int = 8) -> Timeline:
    """The last `most` decode steps of a run on this hardware and at this size, labelled as modelled."""
    about = timeline.about | {"profile": profile.name, "target": repr(target or "as recorded")}
    tasks = to_tasks(timeline, profile, target, most)
    return play(tasks, schedule(tasks, profile.capacity), f"modelled: {profile.name}", about)


def modelled_seconds(timeline: Timeline) -> list[float]:
    """Seconds of each step of a modelled timeline, which ends with the head."""
    ends = [0] + sorted(span.end_ns for span in timeline.spans if span.kind == "head")
    return [(end - start) / 1e9 for start, end in pairwise(ends)]
