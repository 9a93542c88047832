"""The doctor names what is slow and the fix, and never fails where something is missing."""

import pytest
from typer.testing import CliRunner

from hillinfer import native
from hillinfer.commands import doctor
from hillinfer.commands.app import app
from hillinfer.native import ring


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


@pytest.mark.parametrize("limit", ["max", str(512 << 20)])
def test_the_tightest_group_above_counts(tmp_path, limit):
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "outer" / "memory.max").write_text(f"{limit}\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    check = doctor.cgroup(tmp_path, own)
    assert check.fine == (limit == "max") and ("0.50 GiB" in check.found) == (limit != "max")


def test_from_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["doctor", "--drive", str(tmp_path), "--seconds", "0.1"])
    assert done.exit_code == 0 and "GB/s in order" in done.stdout and "io_uring" in done.stdout
    done = CliRunner().invoke(app, ["doctor", "--drive", str(tmp_path / "none")])
    assert done.exit_code == 2 and "mkdir" in done.stderr
