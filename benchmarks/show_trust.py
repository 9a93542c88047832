"""`make show-trust`: measure all machine-checkable claims about faults, memory and trust.

Parts can be named: `python -m benchmarks.show_trust faults memory`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import show_trust_sessions
from benchmarks.claims import ROOT, Claim, tests, verdict


def faults() -> list[Claim]:
    """Behaviour on drive faults."""
    return [
        tests("a block that is not what was written is an error with its place", "tests/test_checksums.py").show(),
        tests("every fault x every system with a drive: one clear error or the right tokens, nothing left",
              "tests/test_faults.py", "-m", "slow or not slow", "-k", "not sweep").show(),
        sweep().show(),
    ]  # fmt: skip


def cost() -> list[Claim]:
    """Cost of checksums."""
    from benchmarks.checksum_cost import costs

    with tempfile.TemporaryDirectory(dir=".") as folder:
        direct, cached = (costs(Path(folder), shares=(0.1,), direct=way)[0] for way in (True, False))
    return [
        Claim("checksums: a tenth of 16,384 records read around the page cache", f"{direct.ratio - 1:+.0%} time",
              "15%", direct.ratio <= 1.15).show(),
        Claim("the same from the page cache, at the speed of memory", f"{cached.ratio - 1:+.0%} time", "40%",
              cached.ratio <= 1.4).show(),
    ]  # fmt: skip


def sweep(faults: int = 10_000) -> Claim:
    """Random faults at random operations of random systems."""
    command = [sys.executable, "-m", "benchmarks.faults", str(faults)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    figure = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
    return Claim(f"{faults:,} injected faults", figure, "0 wrong, 0 left, all injected", done.returncode == 0)


def memory() -> list[Claim]:
    """Budgets under a real memory limit."""
    return [
        tests("under a memory limit a run ends well or is refused at the start, and is never killed",
              "tests/test_memory.py", "-m", "slow or not slow").show(),
    ]  # fmt: skip


PARTS = {  # sessions first: they fork, and must do so before there are threads
    "sessions": show_trust_sessions.claims, "faults": faults, "cost": cost, "memory": memory,
}  # fmt: skip


def main() -> int:
    return verdict([claim for name in sys.argv[1:] or PARTS for claim in PARTS[name]()])


if __name__ == "__main__":
    sys.exit(main())
