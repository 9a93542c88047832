"""Modelled decode steps: the work that a system's rule states, in the order of `Layer`, timed on a profile.

Whether to look ahead is decided by the code that decides it in a run (`Trial`), from the modelled times of both ways.
"""

import math
from dataclasses import replace

from hillinfer.pipeline.lookahead import Trial
from hillinfer.timeline import Timeline
from hillinfer.whatif import costs
from hillinfer.whatif.case import Case
from hillinfer.whatif.engine import Task, play, schedule, step_seconds
from hillinfer.whatif.work import RULES, Work

# What lookahead brings: measured on the embedded model (docs/experiments.md), and assumed for every model.
COVER = ACCURACY = 0.73
PER_ROW = ("score", "select", "guess", "gather", "read", "prefetch")  # one call for each sequence of the batch


class _Steps:
    """Builds the tasks of some decode steps of one case."""

    def __init__(self, case: Case, work: Work, system: str):
        self.case, self.work, self.system, self.tasks = case, work, system, []

    def do(self, lane: str, kind: str, size: float, after, layer: int, step: int, block=math.inf, **how) -> int | None:
        """Add a task unless there is nothing to do; returns what those that follow wait for."""
        after = tuple(sorted({index for index in after if index is not None}))
        if not size:
            return after[-1] if len(after) == 1 else self._join(after, layer, step)
        case, profile = self.case, self.case.profile
        moved = round(size)
        if kind in ("select", "guess") and profile.kinds:
            size = case.context * case.batch * case.shape.code_bytes()  # what its measured cost grows with
        if kind in PER_ROW:
            how["calls"] = case.batch
        if kind in ("read", "prefetch") and not case.deep and profile.has("drive", "read_one"):
            took = size / profile.get("drive.read_one", block)
        else:
            took = costs.seconds(profile, lane, kind, size, block=block, system=self.system, **how)
        self.tasks.append(Task(lane, kind, layer, step, took, moved, after))
        return len(self.tasks) - 1

    def _join(self, after, layer: int, step: int) -> int | None:
        if not after:
            return None
        self.tasks.append(Task("cpu:join", "wait", layer, step, 0.0, 0, after))
        return len(self.tasks) - 1

    def select(self, kind: str, after, layer: int, step: int) -> int | None:
        """Score on every side at once, then choose."""
        w, case = self.work, self.case
        keys = self.do("drive", "read", w.keys, after, layer, step)
        host = self.do("cpu", "score", w.score, [keys, *after], layer, step)
        dram = self.do("drive:dram", "evaluate", w.dram, after, layer, step)
        nand = self.do("drive", "scan", w.nand, after, layer, step, block=1 << 20)
        device = self.do("gpu", "score", w.device, after, layer, step) if case.profile.has("gpu") else host
        if not case.profile.has("gpu") and w.device:
            device = self.do("cpu", "score", w.device, after, layer, step)
        any_scored = w.score or w.dram or w.nand or w.device
        size = 4 * case.context * case.batch * case.shape.kv_heads if any_scored else 0
        return self.do("cpu", kind, size, [host, dram, nand, device, *after], layer, step)

    def build(self, steps: int) -> list[Task]:
        case, w = self.case, self.work
        shape, profile = case.shape, case.profile
        device = costs.lane_of(profile, "cpu", "attend")
        missing = (shape.weight_bytes - case.on_gpu) / shape.layers if profile.has("gpu") else 0
        link = profile.has("gpu")
        new = case.batch * shape.record_bytes
        uses_drive = w.stream + w.keys + w.wanted + w.dram + w.nand + w.inside > 0
        attended: list[int | None] = [None, None]  # of the layers before, across steps
        for step in range(steps):
            for layer in range(shape.layers):
                early = [attended[-2]]  # what comes whatever is selected has room for one layer ahead
                weights = self.do("link", "weights", missing, early, layer, step)
                dense = self.do(device, "dense", shape.layer_weights * shape.width, [attended[-1], weights], layer,
                                step, flops=2 * shape.layer_weights * case.batch, kernels=12)  # fmt: skip
                ready = self.do("cpu", "append", new, [dense], layer, step)
                if uses_drive:  # many tokens are written at once: their latency is shared
                    self.do("drive", "write", new, [ready], layer, step, kernels=0)
                way = "mapped" if w.mapped and profile.has("drive", "mapped") else "read"
                streamed = self.do("drive", way, w.stream, early, layer, step)
                brought = w.stream + w.resident
                streamed = self.do("link", "transfer", brought * link, [streamed, *early], layer, step)
                attend = [ready, streamed]
                now = [ready]
                if w.ahead:
                    # the first layer of a step knows no input before the last step's token
                    guess = self.select("guess", early if layer else [attended[-1]], layer, step)
                    useful = w.wanted * (COVER if w.again else 1.0)
                    size = useful / ACCURACY if w.again else useful
                    ahead = self.do("drive", "prefetch", size, [guess], layer, step, block=w.block)
                    pooled = guess
                    if not w.again:
                        pooled = self.do("cpu", "gather", w.gather, [guess], layer, step)
                    sent = useful + (0 if w.again else w.gather)
                    attend.append(self.do("link", "transfer", sent * link, [ahead, pooled], layer, step))
                    rest, gather = (w.wanted - useful, w.gather) if w.again else (0, 0)
                    now.append(guess)
                else:
                    rest, gather = w.wanted, w.gather
                if w.again or not w.ahead:
                    chosen = self.select("select", now, layer, step)
                    read = self.do("drive", "read", rest, [chosen], layer, step, block=w.block)
                    pooled = self.do("cpu", "gather", gather, [chosen], layer, step)
                    attend += [chosen, self.do("link", "transfer", (rest + gather) * link, [read, pooled], layer, step)]
                    if not link:
                        attend += [read, pooled]
                inside = self.do("drive", "scan", w.inside, [ready], layer, step, block=1 << 20)
                flops = 4 * w.attend / shape.record_bytes * shape.heads * shape.head_dim
                done = self.do(device, "attend", w.attend, [*attend, inside], layer, step, flops=flops)
                attended.append(done)
            head = shape.head_weights * shape.width
            flops = 2 * shape.head_weights * case.batch
            attended.append(self.do(device, "head", head, [attended[-1]], shape.layers, step, flops=flops))
        return self.tasks


def model(case: Case, system: str, steps: int = 3) -> tuple[list[Task], Work]:
    """The tasks of some decode steps, looking ahead or not as a run would choose after trying both (`Trial`)."""
    work = RULES[system](case)
    if not work.again:
        return _Steps(case, work, system).build(steps), work
    built = {
        on: _Steps(case, own, system).build(steps)
        for on, own in ((True, work), (False, replace(work, ahead=False, again=False)))
    }
    took = {on: step_seconds(tasks, schedule(tasks, case.profile.capacity)) for on, tasks in built.items()}
    trial, now = Trial("auto"), 0.0
    while trial.times is not None:
        trial.step(now)
        now += took[trial.on]
    return built[trial.on], work if trial.on else replace(work, ahead=False, again=False)


def seconds(case: Case, system: str) -> float:
    """Modelled seconds of a decode step, once the pipeline is full. DoesNotFit where the system cannot run it."""
    tasks, _ = model(case, system)
    return step_seconds(tasks, schedule(tasks, case.profile.capacity))


def timeline(case: Case, system: str, steps: int = 3) -> Timeline:
    """The modelled steps as a timeline, for every plot and export."""
    about = {"system": system, "model": case.shape.name, "context": case.context, "batch": case.batch}
    about |= {"alpha": case.alpha, "profile": case.profile.name}
    tasks, _ = model(case, system, steps)
    return play(tasks, schedule(tasks, case.profile.capacity), f"modelled: {case.profile.name}", about)
