"""Claims, each measured anew and printed with its figure and its threshold."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Claim:
    text: str
    figure: str
    bar: str
    met: bool

    def show(self) -> "Claim":
        """Print one line and return the claim."""
        print(f"{'met   ' if self.met else 'MISSED'} | {self.text} | {self.figure} | bar: {self.bar}", flush=True)
        return self


def verdict(claims: list[Claim]) -> int:
    """Print the totals and return the exit code: 1 if any claim is missed."""
    missed = sum(not claim.met for claim in claims)
    print(f"{len(claims) - missed} claims met, {missed} missed")
    return int(missed > 0)


def tests(text: str, *arguments: str) -> Claim:
    """The claim that these tests pass. Runs pytest with `arguments`; skipping all of them does not count as passing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider", *arguments]
        code = subprocess.run(command, cwd=ROOT, capture_output=True).returncode
        cases = ET.parse(report).getroot()[0]
    suite = cases.attrib
    for case in cases:
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            print(f"failed | {case.get('classname')}::{case.get('name')}", flush=True)
    total, skipped = int(suite["tests"]), int(suite["skipped"])
    failed = int(suite["failures"]) + int(suite["errors"])
    figure = (
        f"{total - skipped - failed} cases passed, {failed} failed, {skipped} skipped, {float(suite['time']):.0f} s"
    )
    return Claim(text, figure, "all pass", code == 0 and total > skipped)
