"""A discrete-event engine: tasks with dependencies on lanes of limited capacity, on a virtual clock."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hillinfer.timeline import Timeline


@dataclass(slots=True)
class Task:
    """One piece of work. `lane` is a lane of the timeline, or a part of one, such as `link:out` or `drive:dram`.

    It may start when all tasks of `after` (indices in the list) have ended and its lane has a free slot.
    """

    lane: str
    kind: str
    layer: int
    step: int
    seconds: float
    bytes: int = 0
    after: tuple[int, ...] = ()


def schedule(tasks: Sequence[Task], capacity: Mapping[str, int] | None = None) -> list[tuple[float, float]]:
    """Start and end of each task in seconds.

    A lane runs `capacity` tasks at once (one by default), each at full speed; the others queue in the order in which
    they became ready, ties in list order. Deterministic. ValueError for a task that can never start.
    """
    free = defaultdict(lambda: 1, capacity or {})
    missing, followers = [len(set(task.after)) for task in tasks], [[] for _ in tasks]
    for index, task in enumerate(tasks):
        if task.seconds < 0 or free[task.lane] < 1:
            raise ValueError(f"task {index} ({task.kind}) takes {task.seconds} s on {free[task.lane]} {task.lane}")
        for other in set(task.after):
            followers[other].append(index)
    times: list = [None] * len(tasks)
    ready = defaultdict(list)  # lane -> heap of (time when ready, index)
    running, now = [], 0.0  # heap of (end, index)
    for index, count in enumerate(missing):
        if not count:
            heapq.heappush(ready[tasks[index].lane], (now, index))
    touched = set(ready)
    while touched:
        for lane in touched:
            while ready[lane] and free[lane]:
                _, index = heapq.heappop(ready[lane])
                free[lane] -= 1
                times[index] = (now, now + tasks[index].seconds)
                heapq.heappush(running, (times[index][1], index))
        touched, now = set(), running[0][0] if running else now
        while running and running[0][0] == now:  # everything that ends now, before anything starts
            _, index = heapq.heappop(running)
            free[tasks[index].lane] += 1
            touched.add(tasks[index].lane)
            for follower in followers[index]:
                missing[follower] -= 1
                if not missing[follower]:
                    heapq.heappush(ready[tasks[follower].lane], (now, follower))
                    touched.add(tasks[follower].lane)
    if None in times:
        stuck = tasks[times.index(None)]
        raise ValueError(f"{stuck.kind} of layer {stuck.layer}, step {stuck.step}, waits for itself")
    return times


def play(tasks: Sequence[Task], times: Sequence[tuple[float, float]], source: str, about: dict) -> Timeline:
    """The scheduled tasks as a timeline, labelled with the source of its times ("modelled: ...")."""
    timeline = Timeline()
    timeline.source, timeline.about = source, about
    for task, (start, end) in zip(tasks, times, strict=True):
        lane, _, part = task.lane.partition(":")
        detail = {"part": part} if part else {}
        timeline.add(lane, task.kind, task.layer, task.step, round(start * 1e9), round(end * 1e9), task.bytes, **detail)
    timeline.spans.sort(key=lambda span: span.end_ns)
    return timeline


def step_seconds(tasks: Sequence[Task], times: Sequence[tuple[float, float]]) -> float:
    """Seconds of the last step in steady state: from the end of the previous step's head to the end of its own."""
    ends = [end for task, (_, end) in zip(tasks, times, strict=True) if task.kind == "head"]
    return ends[-1] - (ends[-2] if len(ends) > 1 else 0.0)
