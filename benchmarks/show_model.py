"""`make show-model`: every claim about the embedded model that a machine can check, measured again.

N=50 asks fewer than 200 questions in each cell. LONGEVAL=FILE names LongEval's line cases; without it they are not
checked.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.claims import ROOT, Claim, verdict

N = int(os.environ.get("N", "200"))
LEAST = {  # exact match
    "lines_1k": 0.95, "lines_2k": 0.95, "lines_4k": 0.90, "lines_8k": 0.85,
    "needle_1k": 0.95, "needle_2k": 0.95, "needle_4k": 0.90, "needle_8k": 0.85,
    "passage_2k": 0.80, "LongEval": 0.85,
}  # fmt: skip
RUNS = [
    ["--lengths", "1024", "4096", "8192", "--tasks", "lines", "needle"],
    ["--lengths", "2048"],
]


def measured(script: str, *arguments: str) -> list[str]:
    """Lines that a script of data/ writes with --json; its own output goes to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(ROOT / "data" / script), "--json", str(out), *arguments]
        subprocess.run(command, check=True, cwd=ROOT)
        return out.read_text().splitlines()


def answers() -> list[Claim]:
    """Full cache, held-out documents, with 95 % intervals and the partial-key floor."""
    longeval = ["--longeval", os.environ["LONGEVAL"]] if "LONGEVAL" in os.environ else []
    rows = [json.loads(line) for run in RUNS for line in measured("evaluate.py", "--n", str(N), *run)]
    if longeval:
        rows += [json.loads(line) for line in measured("evaluate.py", "--tasks", "--lengths", *longeval)]
    claims = []
    for row in rows:
        name, exact, floor = row["name"], row["exact"], row["floor"]
        figure = f"{exact:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        text = f"{name}, exact match (n={row['n']}" + (")" if floor is None else f", partial-key floor {floor:.3f})")
        if name in LEAST:
            apart = 0.4 if name.startswith(("lines", "needle")) else 0.0
            met = exact >= LEAST[name] and (floor is None or floor <= exact - apart)
            claims.append(Claim(text, figure, f"{LEAST[name]:.2f}" + (", floor 0.40 below" * (apart > 0)), met).show())
        elif name.startswith("two_hop"):
            claims.append(Claim(text, figure, "0.20 above the floor", exact >= floor + 0.2).show())
        elif name.startswith("chain"):
            share = row["tokens_right"]
            claims.append(Claim(f"{name}, tokens of long answers right", f"{share:.3f}", "0.90", share >= 0.9).show())
        elif name.startswith("majority"):
            claims.append(Claim(text, figure, "interval above the floor", row["low"] > floor).show())
    if not longeval:
        print("not checked | LongEval cases | name their file with LONGEVAL=FILE")
    return claims


def attention() -> list[Claim]:
    """Restricted attention, and what the heads do."""
    found = json.loads(measured("attention.py", "--n", str(max(4, N // 2)))[0])
    score = {(task, policy, share): value for task, policy, share, value in found["accuracy"]}
    tasks, claims = list(dict.fromkeys(task for task, *_ in score)), []
    for task in tasks:
        full, tenth = score[task, "full", 1.0], score[task, "top", 0.1]
        claims.append(
            Claim(f"{task}: true top 10 %", f"{tenth:.3f}", f"99 % of full, {full:.3f}", tenth >= 0.99 * full).show()
        )
        for policy in ("window", "random"):
            value = score[task, policy, 0.1]
            claims.append(Claim(f"{task}: {policy} 10 %", f"{value:.3f}", "half of full", value <= full / 2).show())
    falls = [task for task in tasks if score[task, "top", 0.01] <= score[task, "top", 0.1] - 0.05]
    text = "tasks whose true top 1 % is 5 points below the true top 10 %"
    claims.append(Claim(text, ", ".join(falls) or "none", "two tasks", len(falls) >= 2).show())
    sinks = sum(head[3] >= 0.1 for head in found["heads"])
    claims.append(Claim("heads with 10 % of their mass on the first tokens", str(sinks), "1", sinks >= 1).show())
    worse = [t for t in tasks if score[t, "window", 0.2] < score[t, "window+sinks", 0.2]]
    text = "tasks on which a 20 % window is worse without the first tokens"
    claims.append(Claim(text, ", ".join(worse) or "none", "one task", bool(worse)).show())
    return claims


if __name__ == "__main__":
    sys.exit(verdict(answers() + attention()))
