"""A discrete-event engine: tasks with dependencies on lanes of limited capacity, on a virtual clock."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hillinfer.timeline import Timeline


@dataclass(slots=True)
class Task:
    """One piece of work. `lane` is a lane of the timeline, or a part of one, such as `link:out` or `drive:dram`.

    It may begin when all tasks of `after` (their places in the list) have ended and its lane has room.
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

    A lane does `capacity` tasks at once (one by default), each as fast as if it were alone; others wait in the order
    in which they could have begun, and of those that could at once in the order of the list. Deterministic.
    ValueError for a task that can never begin.
    """
    free = defaultdict(lambda: 1, capacity or {})
    missing, followers = [len(set(task.after)) for task in tasks], [[] for _ in tasks]
    for index, task in enumerate(tasks):
        if task.seconds < 0 or free[task.lane] < 1:
            raise ValueError(f"task {index} ({task.kind}) takes {task.seconds} s on {free[task.lane]} {task.lane}")
        for other in set(task.after):
            followers[other].append(index)
    times: list = [None] * len(tasks)
    waiting = defaultdict(list)  # lane -> heap of (ready, index)
    ending = []  # heap of (end, index)

    def begin(lane: str, now: float) -> None:
        while waiting[lane] and free[lane]:
            _, index = heapq.heappop(waiting[lane])
            free[lane] -= 1
            times[index] = (now, now + tasks[index].seconds)
            heapq.heappush(ending, (times[index][1], index))

    for index, count in enumerate(missing):
        if not count:
            heapq.heappush(waiting[tasks[index].lane], (0.0, index))
    for lane in list(waiting):
        begin(lane, 0.0)
    while ending:
        now, touched = ending[0][0], {}
        while ending and ending[0][0] == now:  # all that ends now, before anything begins
            _, index = heapq.heappop(ending)
            free[tasks[index].lane] += 1
            touched[tasks[index].lane] = None
            for follower in followers[index]:
                missing[follower] -= 1
                if not missing[follower]:
                    heapq.heappush(waiting[tasks[follower].lane], (now, follower))
                    touched[tasks[follower].lane] = None
        for lane in touched:
            begin(lane, now)
    if None in times:
        stuck = tasks[times.index(None)]
        raise ValueError(f"{stuck.kind} of layer {stuck.layer}, step {stuck.step}, waits for itself")
    return times


def play(tasks: Sequence[Task], times: Sequence[tuple[float, float]], source: str, about: dict) -> Timeline:
    """The scheduled tasks as a timeline, marked with the source of its times ("modelled: ...")."""
    timeline = Timeline()
    timeline.source, timeline.about = source, about
    for task, (start, end) in zip(tasks, times, strict=True):
        lane, _, part = task.lane.partition(":")
        detail = {"part": part} if part else {}
        timeline.add(lane, task.kind, task.layer, task.step, round(start * 1e9), round(end * 1e9), task.bytes, **detail)
    timeline.spans.sort(key=lambda span: span.end_ns)
    return timeline


def step_seconds(tasks: Sequence[Task], times: Sequence[tuple[float, float]]) -> float:
    """Seconds of the last step, once the pipeline is full: from the end of the head of the step before to its own."""
    ends = [end for task, (_, end) in zip(tasks, times, strict=True) if task.kind == "head"]
    return ends[-1] - (ends[-2] if len(ends) > 1 else 0.0)
