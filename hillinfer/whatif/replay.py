"""A recorded run on other hardware, or of another size: its spans as tasks, re-timed by the engine.

The order and the dependencies are those that the run itself had, so a change in the pipeline changes its replay. What a
span did counts, never how long it took. How sizes scale (`Target`), each by its own stated rule:

    score, evaluate, abstract, select, guess, other cached tokens x batch x bytes of a token's codes
    gather, near, read, prefetch, attend, swap ...  attended tokens x batch x bytes of a token's record; where the pool
                                                    holds a smaller share, more of them are read and fewer gathered
    append, encode, write                           batch x bytes of a token's record
    dense, head                                     parameters; operations also by the batch
    layers                                          the first is the first; the others are spread over the recorded
"""

import bisect
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from hillinfer.systems.shapes import ModelShape
from hillinfer.tiers.block_file import BLOCK
from hillinfer.timeline import Span, Timeline
from hillinfer.whatif import costs
from hillinfer.whatif.devices import Profile
from hillinfer.whatif.engine import Task, play, schedule
from hillinfer.whatif.recording import BESIDE, Recorded, Step, decode_steps, recorded, size_of

CACHED = ("score", "evaluate", "inside", "merge", "select", "guess", "other", "view", "abstract")
ATTENDED = ("gather", "near", "read", "prefetch", "transfer", "attend", "swap")
AMONG_ROWS = CACHED + ATTENDED  # one call for each sequence of a batch
FROM_DRIVE = ("read", "prefetch")
BOARD = 0.8  # share of host memory that may hold KV records


@dataclass(frozen=True)
class Target:
    """What a run is scaled to; None keeps what was recorded."""

    shape: ModelShape | None = None
    context: int | None = None
    batch: int | None = None
    alpha: float | None = None


def to_tasks(timeline: Timeline, profile: Profile, target: Target | None = None, most: int = 8) -> list[Task]:
    """The last `most` decode steps as tasks, their work scaled to the target and timed by the profile.

    What one thread did, it does in order. Beside it: a drive's evaluation, from where its span began until its thread
    merges; another thread's work for a layer, from where the main thread was when it began. The main thread waits for a
    guess before it changes what the guess reads, and for a prefetch before it uses it (`Layer.append`, `fetch`).
    """
    scale = Scale(recorded(timeline), target or Target(), profile)
    steps, tasks, last = decode_steps(timeline), [], None
    for number, step in enumerate(steps[-most - 1 : -1] or steps):
        last = _add_step(tasks, step, number, scale, last)
    return tasks


def _add_step(tasks: list[Task], step: Step, number: int, scale: "Scale", last: int | None) -> int:
    """Append one step's tasks, after the main thread's `last` one; returns its new last one."""
    old, new = scale.about.shape.layers, scale.shape.layers
    by_layer: dict[str, dict[int, list[Span]]] = {thread: defaultdict(list) for thread in step.threads}
    for thread, own in step.threads.items():
        for span in own:
            by_layer[thread][old if span.kind == "head" else span.layer].append(span)
    main = step.threads[step.main]
    place = {id(span): (layer, i) for layer, own in by_layer[step.main].items() for i, span in enumerate(own)}
    first = {thread: min(span.start_ns for span in own) for thread, own in step.threads.items()}
    before_step, latest = last, {step.main: last}  # thread -> its last task
    made: dict[tuple[int, int], int] = {}  # the main thread's (layer, place in it) -> task

    def origin(span: Span, layer: int, source: int) -> int | None:
        """What the main thread had done when this span began, moved along with the layer."""
        for spans, where, done in ((main, place, made), *([scale.before] if scale.before else [])):
            index = bisect.bisect_right(spans, span.start_ns, key=lambda own: own.end_ns) - 1
            if index >= 0:
                of, i = where[id(spans[index])]
                return done.get((of + (layer - source if spans is main else 0), i), before_step)
        return before_step

    for layer in range(new + 1):
        source = old if layer == new else layer and 1 + (layer - 1) * (old - 1) // max(1, new - 1)
        ready: dict[str, list[int]] = defaultdict(list)  # kind -> tasks of this layer that others wait for
        for thread in sorted(by_layer, key=lambda name: (name == step.main, first[name])):  # a guess, then its reads
            began = False
            for i, span in enumerate(by_layer[thread][source]):
                after = [latest.get(thread)]
                waits = {"append": "guess", "wait": "prefetch", "prefetch": "guess"}.get(span.kind)
                if thread != step.main and not began and (not waits or thread.startswith("beside")):
                    after.append(origin(span, layer, source))
                began = True
                if span.kind in BESIDE and thread == step.main:
                    after = [origin(span, layer, source)]
                after += ready[waits] if waits else []
                if thread.startswith("beside") or span.kind in ("wait", "attend"):
                    after += ready["beside"]
                if span.kind in ("merge", "select", "guess", "wait"):
                    after += [index for kind in BESIDE for index in ready.pop(kind, [])]
                for part in [*(scale.before_attend(span) if span.kind == "attend" else []), span]:
                    wanted = tuple(sorted({index for index in after if index is not None}))
                    tasks.append(scale.task(part, layer, number, wanted))
                    after = [len(tasks) - 1]
                ready["beside" if thread.startswith("beside") else span.kind].append(len(tasks) - 1)
                if span.kind not in BESIDE:
                    latest[thread] = len(tasks) - 1
                if thread == step.main:
                    made[layer, i] = latest[thread] if span.kind not in BESIDE else made.get((layer, i - 1), last)
    scale.before = (main, place, made)
    return latest[step.main]


class Scale:
    """Recorded sizes -> sizes at the target, and these to seconds on the profile."""

    def __init__(self, about: Recorded, target: Target, profile: Profile):
        self.about, self.profile = about, profile
        self.before: tuple | None = None  # the step before: its spans, their places, the tasks made of them
        self.shape, self.batch = target.shape or about.shape, target.batch or about.batch
        self.cached = target.context or about.cached
        share = about.attended / about.cached
        alpha = share if target.alpha is None or share > 0.999 else target.alpha
        self.attended = alpha * self.cached
        old, rows = about.shape, self.batch / about.batch
        tokens = self.cached / about.cached
        self.cached_factor = tokens * rows * self.shape.code_bytes() / old.code_bytes()
        record = self.shape.record_bytes / old.record_bytes
        self.new_factor = rows * record
        self.attended_factor = self.attended / about.attended * rows * record
        room = profile.get("cpu.memory") * BOARD / self.shape.kv_bytes(round(self.cached), self.batch)
        self.pool = min(about.pool, room)
        miss = drive_share(about, self.pool)
        self.drive_factor = miss / about.drive if about.drive else 1.0
        self.pool_factor = (1 - miss) / (1 - about.drive) if about.drive < 1 else 1.0
        kv = self.shape.kv_bytes(round(self.cached), self.batch)
        fits = profile.has("gpu") and kv + self.shape.weight_bytes < profile.get("gpu.memory")
        self.crosses = profile.has("gpu") and not (about.pool == 1 and fits)

    def factor(self, kind: str) -> float:
        if kind in FROM_DRIVE:
            return self.attended_factor * self.drive_factor
        if kind == "gather":
            return self.attended_factor * self.pool_factor
        if kind in ATTENDED:
            return self.attended_factor
        return self.cached_factor if kind in CACHED else self.new_factor

    def task(self, span: Span, layer: int, step: int, after: tuple[int, ...]) -> Task:
        profile, shape = self.profile, self.shape
        kind, calls = span.kind, 1
        if kind in ("dense", "head"):
            size = shape.width * (shape.layer_weights if kind == "dense" else shape.head_weights)
        else:
            size = size_of(kind, span.bytes, self.about) * self.factor(kind)
            calls = max(1, round(self.batch / self.about.batch)) if kind in AMONG_ROWS and kind != "attend" else 1
        if kind in ("select", "guess") and not profile.kinds:
            size *= 4 / shape.head_dim  # it reads a score where the code of a key was
        flops = 2 * size / shape.width * self.batch if kind in ("dense", "head") else 0.0
        if kind == "attend":
            flops = 4 * size / shape.record_bytes * shape.heads * shape.head_dim
        block = math.ceil(shape.record_bytes / BLOCK) * BLOCK if kind in FROM_DRIVE else math.inf
        lane = costs.lane_of(profile, span.lane, kind)
        how = dict(block=block, flops=flops, calls=calls, system=self.about.system)
        moved = round(size) if span.bytes else 0
        return Task(lane, kind, layer, step, costs.seconds(profile, lane, kind, size, **how), moved, after)

    def before_attend(self, attend: Span) -> list[Span]:
        """What a recording lacks: work between the spans, and the way to a GPU where it was made without one."""
        extra = [Span("cpu", "other", attend.layer, attend.step, 0, 0)]
        if self.crosses:
            extra.append(Span("link", "transfer", attend.layer, attend.step, 0, 0, attend.bytes))
        return extra


def drive_share(about: Recorded, pool: float) -> float:
    """Share of the attended tokens that the drive serves where the pool holds this share of all tokens.

    A straight line from all (an empty pool) to what was recorded at the recorded pool: recorded pools are ranked, so
    this is what holds for a pool made smaller at random, an upper bound.
    """
    return 1 - (1 - about.drive) * pool / about.pool if about.pool else about.drive


def replay(timeline: Timeline, profile: Profile, target: Target | None = None, most: int = 8) -> Timeline:
    """The run's last decode steps, `most` of them, on this hardware and of this size; marked as modelled."""
    about = timeline.about | {"profile": profile.name, "target": repr(target or "as recorded")}
    tasks = to_tasks(timeline, profile, target, most)
    return play(tasks, schedule(tasks, profile.capacity), f"modelled: {profile.name}", about)


def modelled_seconds(timeline: Timeline) -> list[float]:
    """Seconds of each step of a modelled timeline, which ends with the head."""
    ends = [0] + sorted(span.end_ns for span in timeline.spans if span.kind == "head")
    return [(end - start) / 1e9 for start, end in pairwise(ends)]
