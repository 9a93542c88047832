"""The engine against cases solved by hand: conserved quantities, and the effects of a faster part."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hillinfer.whatif.engine import Task, play, schedule, step_seconds


def task(lane: str, seconds: float, *after: int, kind: str = "work") -> Task:
    return Task(lane, kind, 0, 0, seconds, 0, after)


def test_two_lanes_work_at_once():
    assert schedule([task("cpu", 2), task("drive", 3)]) == [(0, 2), (0, 3)]


def test_one_lane_takes_one_at_a_time():
    assert schedule([task("cpu", 2), task("cpu", 3)]) == [(0, 2), (2, 5)]


def test_one_dependency():
    """The host scores 2 s, the drive 3; what was chosen is sent after both, 1 s."""
    assert schedule([task("cpu", 2), task("drive", 3), task("link", 1, 0, 1)])[2] == (3, 4)


def test_a_full_queue():
    """Five reads of 1 s, two at once: three rounds, in order."""
    times = schedule([task("drive", 1) for _ in range(5)], {"drive": 2})
    assert times == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3)]


def test_who_is_ready_first_goes_first():
    """The first of the list is ready at 2, the second at 1."""
    tasks = [task("link", 5, 2), task("link", 1, 3), task("cpu", 2), task("gpu", 1)]
    assert schedule(tasks)[:2] == [(2, 7), (1, 2)]


def test_a_prefetch_hides_behind_compute():
    """Three layers: read 2 s each, compute 3 s each, a layer's read one layer ahead: only the first read shows."""
    tasks = [task("drive", 2), task("gpu", 3, 0), task("drive", 2), task("gpu", 3, 1, 2), task("drive", 2, 1)]
    tasks.append(task("gpu", 3, 3, 4))
    assert schedule(tasks)[-1] == (8, 11)


def test_what_can_never_begin_is_an_error():
    with pytest.raises(ValueError, match="waits for itself"):
        schedule([task("cpu", 1, 1), task("cpu", 1, 0)])
    with pytest.raises(ValueError, match="takes -1"):
        schedule([task("cpu", -1)])


def test_a_step_counts_from_the_head_before_it():
    heads = [task("gpu", 2, kind="head"), task("gpu", 3, 0, kind="head")]
    assert step_seconds(heads, schedule(heads)) == 3


def test_a_faster_part_can_slow_the_whole_down():
    """Why "faster is never slower" holds for steps (test_replay.py) but not for any graph: lanes serve who comes first.

    The cpu's task at 3 s lets the short transfer go first, on whose end 10 s of gpu work wait. At 1 s the long transfer
    comes first, and the gpu waits for it.
    """

    def total(cpu: float) -> float:
        tasks = [task("cpu", cpu), task("drive", 2), task("link", 10, 0), task("link", 1, 1), task("gpu", 10, 3)]
        return max(end for _, end in schedule(tasks))

    assert total(3) == 13 and total(1) == 22


graphs = st.lists(
    st.tuples(
        st.sampled_from(["cpu", "drive", "link:in"]), st.integers(0, 9), st.lists(st.integers(0, 30), max_size=3)
    ),
    min_size=1,
    max_size=30,
)


@given(graphs, st.integers(1, 3))
def test_nothing_is_lost_and_no_lane_is_overfull(graph, room):
    tasks = [task(lane, s, *{a % i for a in after} if i else ()) for i, (lane, s, after) in enumerate(graph)]
    times = schedule(tasks, {"drive": room})
    lanes = defaultdict(list)
    for own, (start, end) in zip(tasks, times, strict=True):
        assert end - start == own.seconds
        assert start >= max((times[i][1] for i in own.after), default=0)
        lanes[own.lane].append((start, end))
    for lane, spans in lanes.items():
        capacity = room if lane == "drive" else 1
        for start, end in spans:
            if end > start:
                assert sum(a <= start < b for a, b in spans) <= capacity
    for own, (start, _) in zip(tasks, times, strict=True):  # no lane is idle while something could begin
        ready = max((times[i][1] for i in own.after), default=0)
        capacity = room if own.lane == "drive" else 1
        for moment in {ready, *(end for _, end in lanes[own.lane] if ready <= end < start)}:
            if moment < start:
                assert sum(a <= moment < b for a, b in lanes[own.lane]) == capacity


def test_a_played_timeline_is_marked_and_keeps_bytes(tmp_path):
    tasks = [Task("drive:dram", "evaluate", 1, 0, 0.5, 100), Task("link", "transfer", 1, 0, 0.25, 7, (0,))]
    line = play(tasks, schedule(tasks), "modelled: box", {"system": "x"})
    assert [span.bytes for span in line.spans] == [100, 7] and line.spans[0].lane == "drive"
    assert line.chrome_trace()["otherData"] == {"times": "modelled: box", "about": {"system": "x"}}
    assert line.busy_ms("drive") == 500
