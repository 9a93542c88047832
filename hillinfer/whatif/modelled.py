"""Modelled decode steps: the traffic of a system's rule, in the order of `Layer`, timed on a profile.

Lookahead is chosen as in a run: the faster way of the two, without it if they tie.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from hillinfer.timeline import Timeline
from hillinfer.whatif import costs
from hillinfer.whatif.engine import Task, play, schedule, step_seconds
from hillinfer.whatif.rules import RULES, Traffic
from hillinfer.whatif.scenario import Scenario

# Coverage and accuracy of lookahead: measured on the embedded model (docs/experiments.md), assumed for every model.
COVER = ACCURACY = 0.73
PER_ROW = ("score", "select", "guess", "gather", "read", "prefetch")  # one call for each sequence of the batch
NAND_BLOCK = 1 << 20


class _Steps:
    """Builds the tasks of some decode steps of one scenario. `at` is the layer and the step being built."""

    def __init__(self, case: Scenario, traffic: Traffic, system: str):
        self.case, self.traffic, self.system = case, traffic, system
        self.tasks: list[Task] = []
        self.at = (0, 0)

    def add(self, lane: str, kind: str, size: float, after: Iterable[int | None], block=math.inf, **how) -> int | None:
        """Add a task unless it has no bytes. Returns the task for its successors to wait for."""
        after = tuple(sorted({index for index in after if index is not None}))
        if not size and len(after) < 2:
            return after[0] if after else None
        if not size:
            lane, kind = "cpu:join", "wait"
        case, moved = self.case, round(size) if kind not in costs.FIXED else 0
        if kind in ("select", "guess") and case.profile.kinds:
            size = case.context * case.batch * case.shape.code_bytes()  # as in its measured cost
        if kind in PER_ROW:
            how["calls"] = case.batch
        took = costs.seconds(case.profile, lane, kind, size, block=block, system=self.system, **how)
        self.tasks.append(Task(lane, kind, *self.at, took, moved, after))
        return len(self.tasks) - 1

    def select(self, kind: str, after: list[int | None]) -> int | None:
        """Score on all sides concurrently, then select."""
        t, case = self.traffic, self.case
        keys = self.add("drive", "read", t.keys, after)
        scored = [
            self.add("cpu", "score", t.score, [keys, *after]),
            self.add("drive:dram", "evaluate", t.dram, after),
            self.add("drive", "scan", t.nand, after, NAND_BLOCK),
            self.add("gpu" if case.profile.has("gpu") else "cpu", "score", t.device_score, after, kernels=t.kernels),
        ]
        scores = 4 * case.context * case.batch * case.shape.kv_heads
        scores *= t.score + t.dram + t.nand + t.device_score > 0
        return self.add("cpu", kind, scores, [*scored, *after])

    def build(self, steps: int) -> list[Task]:
        """The tasks of `steps` decode steps, each ending with the head."""
        shape, attended = self.case.shape, [None, None]  # attended: the task that ends each layer, over all steps
        device = costs.lane_of(self.case.profile, "cpu", "attend")
        for step in range(steps):
            for layer in range(shape.layers):
                self.at = (layer, step)
                attended.append(self._layer(device, *attended[-2:]))
            self.at = (shape.layers, step)
            size, flops = shape.head_weights * shape.width, 2 * shape.head_weights * self.case.batch
            attended.append(self.add(device, "head", size, [attended[-1]], flops=flops))
        return self.tasks

    def _layer(self, device: str, before: int | None, last: int | None) -> int | None:
        """One layer, after the previous layer's `last` task and the one `before` it; returns its last task."""
        case, t, shape, profile = self.case, self.traffic, self.case.shape, self.case.profile
        link = profile.has("gpu")
        early = [before]  # transfers that depend on no selection are buffered one layer ahead
        missing = (shape.weight_bytes - case.on_gpu) / shape.layers if link else 0
        weights = self.add("link", "weights", missing, early)
        flops = 2 * shape.layer_weights * case.batch
        size = shape.layer_weights * shape.width
        dense = self.add(device, "dense", size, [last, weights], flops=flops, kernels=12)
        new = case.batch * shape.record_bytes
        if t.near:
            return self._near(dense, new)
        ready = self.add("cpu", "append", new, [dense])
        if t.stream + t.keys + t.fetched + t.dram + t.nand + t.inside > 0:
            self.add("drive", "write", new, [ready], kernels=0)  # written in batches, which share the latency
        way = "mapped" if t.mapped and profile.has("drive", "mapped") else "read"
        streamed = self.add("drive", way, t.stream, early)
        attend = [ready, self.add("link", "transfer", (t.stream + t.resident) * link, [streamed, *early])]
        guess, fetched = None, t.fetched
        if t.lookahead:  # the first layer of a step needs the token of the last step
            guess = self.select("guess", early if self.at[0] else [last])
            useful = t.fetched * (COVER if t.reselect else 1.0)
            ahead = self.add("drive", "prefetch", useful / (ACCURACY if t.reselect else 1.0), [guess], t.block)
            early_gather = 0 if t.reselect else t.gather
            gathered = self.add("cpu", "gather", early_gather, [guess])
            attend.append(self.add("link", "transfer", (useful + early_gather) * link, [ahead, gathered]))
            fetched = t.fetched - useful
        if t.reselect or not t.lookahead:
            selected = self.select("select", [ready, guess])
            read = self.add("drive", "read", fetched, [selected], t.block)
            gathered = self.add("cpu", "gather", t.gather, [selected])
            attend += [selected, self.add("link", "transfer", (fetched + t.gather) * link, [read, gathered])]
            attend += [] if link else [read, gathered]
        inside = self.add("drive", "scan", t.inside, [ready], NAND_BLOCK)
        flops = 4 * t.attend / shape.record_bytes * shape.heads * shape.head_dim
        return self.add(device, "attend", t.attend, [*attend, inside], flops=flops)

    def _near(self, dense: int, new: int) -> int:
        """One layer after its `dense` task: the query goes to the records, in pinned memory, and the output returns."""
        case, t, shape = self.case, self.traffic, self.case.shape
        row = case.batch * shape.heads * shape.head_dim * shape.width  # a query, or an output
        chosen = self.add("gpu", "score", t.device_score, [dense], kernels=t.kernels)
        positions = 8 * t.near / shape.record_bytes * (t.device_score > 0)
        ready = self.add("link", "query", row + new + positions, [chosen])
        waited = self.add("link", "synchronize", 1, [ready])
        ready = self.add("cpu", "python", 1, [waited], calls=2 - (t.device_score > 0))
        self.add("drive", "write", new * (t.fetched > 0), [ready], kernels=0)
        if not t.device_score:
            scored = self.add("cpu", "score", t.score, [self.add("cpu", "threads", 1, [ready])])
            ready = self.add("cpu", "select", 4 * case.context * case.batch * shape.kv_heads, [scored])
        ready = self.add("drive", "read", t.fetched, [ready], t.block)
        flops = 4 * t.near / shape.record_bytes * shape.heads * shape.head_dim
        attended = self.add("cpu", "attend", t.near, [self.add("cpu", "threads", 1, [ready])], flops=flops)
        return self.add("link", "output", row, [attended])


def model(case: Scenario, system: str, steps: int = 3) -> tuple[list[Task], Traffic]:
    """The tasks of some decode steps, with or without lookahead, whichever is faster."""
    traffic = RULES[system](case)
    ways = [replace(traffic, lookahead=False, reselect=False), traffic] if traffic.reselect else [traffic]
    built = [(_Steps(case, way, system).build(steps), way) for way in ways]
    return min(built, key=lambda each: _seconds(case, each[0]))  # the first of a tie


def _seconds(case: Scenario, tasks: list[Task]) -> float:
    return step_seconds(tasks, schedule(tasks, case.profile.capacity))


def seconds(case: Scenario, system: str) -> float:
    """Modelled seconds of a decode step in steady state. DoesNotFit if the system cannot run it."""
    return _seconds(case, model(case, system)[0])


def timeline(case: Scenario, system: str, steps: int = 3) -> Timeline:
    """The modelled steps as a timeline, for plots and exports."""
    about = {"system": system, "model": case.shape.name, "context": case.context, "batch": case.batch}
    about |= {"alpha": case.alpha, "profile": case.profile.name}
    tasks, _ = model(case, system, steps)
    return play(tasks, schedule(tasks, case.profile.capacity), f"modelled: {case.profile.name}", about)
