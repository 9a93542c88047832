"""The budget is the remainder of the limit; extents never overlap; the near path never exceeds its budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hillinfer.pipeline.memory import Memory, read_memory
from hillinfer.systems.lossless.plan import DIRECT, NEAR, Plan

MIB = 1 << 20


def machine(root, mounts, groups, available=16 << 30):
    """A /proc and a /sys of our own. groups: folder -> {file: text}."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {32 << 20} kB\nMemAvailable: {available >> 10} kB\n")
    (root / "proc/self/mounts").write_text(mounts)
    for folder, files in groups.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / folder / name).write_text(text)
    return root


V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"
V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"


def v2(limit, anon, shmem):
    return {"memory.max": f"{limit}\n", "memory.stat": f"anon {anon}\nfile 999\nshmem {shmem}\n"}


def v1(limit, anon, shmem):
    stat = f"cache 5\nrss 1\ntotal_rss {anon}\ntotal_shmem {shmem}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.stat": stat}


def test_the_budget_is_what_the_limit_leaves():
    assert Memory(1000, 300, 100, "").budget(200) == 400
    assert Memory(1000, 300, 100, "").budget(700) == 0


@pytest.mark.parametrize("mounts, fields, base", [(V2, v2, "sys/fs/cgroup"), (V1, v1, "sys/fs/cgroup/memory")])
def test_the_tightest_group_counts(tmp_path, mounts, fields, base):
    inner, outer = fields(900 * MIB, 100 * MIB, 0), fields(800 * MIB, 150 * MIB, 10 * MIB)
    root = machine(tmp_path, mounts, {f"{base}/a": outer, f"{base}/a/b": inner})
    (root / "proc/self/cgroup").write_text("0::/a/b\n" if fields is v2 else "3:cpu:/x\n4:memory:/a/b\n0::/\n")
    memory = read_memory(root)
    assert (memory.limit, memory.anonymous, memory.shmem) == (800 * MIB, 150 * MIB, 10 * MIB)
    assert memory.source.startswith("cgroup v")
    assert memory.budget(40 * MIB) == 600 * MIB


@pytest.mark.parametrize("mounts, fields", [(V2, v2), (V1, v1)])
def test_without_a_limit_it_is_the_machines_memory(tmp_path, mounts, fields):
    base = "sys/fs/cgroup" if fields is v2 else "sys/fs/cgroup/memory"
    root = machine(tmp_path, mounts, {f"{base}/a": fields("max" if fields is v2 else 2**63 - 4096, 5, 5)})
    (root / "proc/self/cgroup").write_text("0::/a\n" if fields is v2 else "4:memory:/a\n")
    assert read_memory(root) == Memory(16 << 30, 0, 0, "the machine's available memory")


def test_a_group_that_slows_its_processes_down_has_a_limit(tmp_path):
    fields = v2(900 * MIB, 100 * MIB, 0) | {"memory.high": f"{700 * MIB}\n"}
    root = machine(tmp_path, V2, {"sys/fs/cgroup/a": fields})
    (root / "proc/self/cgroup").write_text("0::/a\n")
    assert read_memory(root).budget() == 600 * MIB


def test_in_a_container_the_mount_is_ours(tmp_path):
    root = machine(tmp_path, V1, {"sys/fs/cgroup/memory": v1(500 * MIB, 100 * MIB, 0)})
    (root / "proc/self/cgroup").write_text("4:memory:/docker/0123\n")
    assert read_memory(root).budget() == 400 * MIB


def test_this_machine_can_be_read():
    assert read_memory().limit > 0


@given(
    tensors=st.integers(1, 40),
    budget=st.integers(0, 3000),
    steps=st.lists(st.integers(1, 64), min_size=1, max_size=8),
)
def test_extents_never_overlap_and_the_budget_holds(tensors, budget, steps):
    size = {NEAR: 0, DIRECT: 0}

    def allocate(path, blocks):
        size[path] += blocks
        return size[path] - blocks

    plan = Plan(tensors, budget, allocate)
    for blocks in steps:
        plan.extend(blocks)
        assert plan.bound[NEAR] <= budget
    used = {path: np.zeros(size[path], int) for path in size}
    for extents in plan.extents:
        position = 0
        for extent in extents:
            assert extent.first == position  # every block of a tensor lies somewhere, once
            position += extent.count
            used[extent.path][extent.start : extent.start + extent.count] += 1
        assert position == plan.blocks == sum(steps)
    assert all((blocks == 1).all() for blocks in used.values())


@given(budget=st.integers(0, 400), blocks=st.integers(1, 20))
def test_first_tensors_first_and_as_many_as_fit(budget, blocks):
    plan = Plan(16, budget, lambda path, n: 0)
    plan.extend(blocks)
    near = [extents[0].path == NEAR for extents in plan.extents]
    assert near == sorted(near, reverse=True)
    assert sum(near) == min(16, budget // blocks)


@given(start=st.integers(0, 3000), more=st.integers(0, 3000))
def test_spans_cover_a_range_once(start, more):
    plan = Plan(3, 7, lambda path, n: 0)
    for blocks in (5, 2, 9):
        plan.extend(blocks)
    end = min(start + more, 16 * 256)
    spans = list(plan.spans(1, start, end, 256))
    assert [low for *_, low, _ in spans] == [start, *(high for *_, high in spans)][: len(spans)]
    assert sum(high - low for *_, low, high in spans) == max(0, end - start)
