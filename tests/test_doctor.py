"""The doctor names each bottleneck and its fix, and never fails on a missing component."""

import pytest
from typer.testing import CliRunner

from hillinfer import native
from hillinfer.commands import doctor
from hillinfer.commands.app import app
from hillinfer.native import ring
from tests.test_planner import V1, V2, machine, v1, v2


def test_every_check_has_a_finding_and_every_slow_one_its_fix(tmp_path):
    checks = list(doctor.examine(tmp_path, seconds=0.01))
    names = {check.name for check in checks}
    assert {"GPU", "instructions", "compiler", "io_uring", "O_DIRECT", "memory limit", "raw device", "drive"} <= names
    assert {"XRT (SmartSSD)", "free space", "memory", "scoring INT8"} <= names
    for check in checks:
        assert check.found and (check.fine or (check.slow and check.fix)), check
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named_with_its_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler was found: install gcc or clang, or name one in CC")
    monkeypatch.setattr(ring, "why_not", lambda: "Operation not permitted")
    assert not doctor.compiler().fine and "install gcc" in doctor.compiler().fix
    assert not doctor.ring().fine and "Operation not permitted" in doctor.ring().found
    monkeypatch.setattr(doctor, "CONTEXT", 10**15)
    assert not doctor.space(tmp_path).fine


@pytest.mark.parametrize("limit", ["memory.max", "memory.high", None])
def test_a_memory_limit_of_cgroup_v2(tmp_path, limit):
    """Of a parent group; by memory.high a process is slowed down, by memory.max killed."""
    groups = {"sys/fs/cgroup/outer/inner": v2("max", 1, 1), "sys/fs/cgroup/outer": v2("max", 1, 1)}
    if limit:
        groups["sys/fs/cgroup/outer"] |= {limit: f"{512 << 20}\n"}
    root = machine(tmp_path, V2, groups)
    (root / "proc/self/cgroup").write_text("0::/outer/inner\n")
    check = doctor.memory_limit(root)
    assert check.fine == (limit is None) and ("0.50 GiB by cgroup v2 outer" in check.found) == (limit is not None)


@pytest.mark.parametrize("folder", ["docker/0123", ""])
def test_a_memory_limit_of_cgroup_v1(tmp_path, folder):
    """On the host, and in a container, which sees its own group as the root of the mount."""
    root = machine(tmp_path, V1, {f"sys/fs/cgroup/memory/{folder}": v1(512 << 20, 1, 1)})
    (root / "proc/self/cgroup").write_text("4:memory:/docker/0123\n")
    check = doctor.memory_limit(root)
    assert not check.fine and "0.50 GiB by cgroup v1" in check.found and "--host-budget" in check.fix


def test_without_proc_the_memory_limit_is_unknown(tmp_path):
    assert "unknown" in doctor.memory_limit(tmp_path).found


def test_from_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["doctor", "--drive", str(tmp_path), "--seconds", "0.1"])
    assert done.exit_code == 0 and "GB/s in order" in done.stdout and "io_uring" in done.stdout
    done = CliRunner().invoke(app, ["doctor", "--drive", str(tmp_path / "none")])
    assert done.exit_code == 2 and "mkdir" in done.stderr
