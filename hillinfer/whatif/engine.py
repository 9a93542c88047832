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
    slots = defaultdict(lambda: [0.0])  # lane -> heap of the times when each of its slots is free
    slots |= {lane: [0.0] * count for lane, count in (capacity or {}).items()}
    missing, followers = [len(set(task.after)) for task in tasks], [[] for _ in tasks]
    for index, task in enumerate(tasks):
        count = len(slots[task.lane])
        if task.seconds < 0 or not count:
            raise ValueError(f"task {index} ({task.kind}) takes {task.seconds} s on {count} {task.lane}")
        for other in set(task.after):
            followers[other].append(index)
    times: list = [None] * len(tasks)
    ready = [(0.0, index) for index, count in enumerate(missing) if not count]  # heap of (time when ready, index)
    while ready:  # no task that becomes ready later is ready before the first of these
        now, index = heapq.heappop(ready)
        start = max(now, slots[tasks[index].lane][0])
        times[index] = (start, start + tasks[index].seconds)
        heapq.heapreplace(slots[tasks[index].lane], times[index][1])
        for follower in followers[index]:
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(ready, (max(times[other][1] for other in tasks[follower].after), follower))
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
