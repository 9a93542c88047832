"""Trees of this project in turns: python -m benchmarks.trees OTHER ... [--rounds N] [--parts micro,overhead,real]

Each round runs every part in all trees, one after the other and in alternating order, so that all meet the same
machine. Prints, row by row, the median of this tree's time over another's, round by round, and the quartiles.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.claims import Claim, verdict
from benchmarks.compare import rows_of

HERE = Path(__file__).parents[1]
FIGURES = {"micro": ("ms", "us"), "overhead": ("full_ms",), "real": ("ms",)}  # a row's time, by part
SLOWER = 1.05  # the bar


def run(tree: Path, part: str, folder: Path) -> dict:
    """One run of `benchmarks.PART` in a tree; its JSON."""
    out = folder / "result.json"
    options = [] if part == "overhead" else ["--drive", str(folder)]
    options += ["--tokens", "8192"] if part == "real" else []
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", f"benchmarks.{part}", *options, "--out", str(out)]
    out.unlink(missing_ok=True)  # `check` is off: a missed bar is no failure, a missing result is
    subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=False)
    return json.loads(out.read_text(encoding="utf-8"))


def times(result: dict, part: str) -> dict[tuple, float]:
    """Each row's time by its label."""
    found = {}
    for label, figures in rows_of(result).items():
        if own := [figures[name] for name in FIGURES[part] if name in figures]:
            found[label] = own[0]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("others", type=Path, nargs="+", help="other trees, such as git worktrees of earlier commits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="micro,overhead,real")
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive")
    words = parser.parse_args()
    claims = []
    with tempfile.TemporaryDirectory(dir=words.drive.resolve()) as folder:
        for part in words.parts.split(","):
            ratios: dict[tuple, list[float]] = {}
            for turn in range(words.rounds):
                trees = [HERE, *(tree.resolve() for tree in words.others)]
                results = {tree: run(tree, part, Path(folder)) for tree in (trees if turn % 2 else trees[::-1])}
                ours, *theirs = (times(results[tree], part) for tree in trees)
                for tree, rows in zip(trees[1:], theirs, strict=True):
                    for label in ours.keys() & rows.keys():
                        ratios.setdefault((tree.name, *label), []).append(ours[label] / rows[label])
            for (tree, *label), values in sorted(ratios.items()):
                low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
                text, figure = f"{part}: {' '.join(label)}, over {tree}", f"{middle:.3f} ({low:.3f} to {high:.3f})"
                claims.append(Claim(text, figure, f"{SLOWER} or less", middle <= SLOWER).show())
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
