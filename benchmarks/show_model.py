"""`make show-model`: measure all machine-checkable claims about the embedded model.

N=50 asks 50 questions per cell instead of 200. LONGEVAL=FILE names LongEval's line cases, which are otherwise skipped.
AGAIN=FOLDER names a retrained model (`make train`) for comparison. Measurements are written to out/model/, for
data/card.py.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.claims import ROOT, Claim, verdict
from hillinfer.assets import load_embedded
from hillinfer.config import Settings
from hillinfer.longbench.runner import ask_each, is_right
from hillinfer.longbench.synthetic import in_window
from hillinfer.systems.registry import POLICIES

sys.path.append(str(ROOT / "data"))
from card import bar_of

KEPT = ROOT / "out" / "model"
N = int(os.environ.get("N", "200"))
RUNS = [
    ["--lengths", "1024", "4096", "8192", "--tasks", "lines", "needle"],
    ["--lengths", "1024", "--tasks", "majority", "tally"],
    ["--lengths", "2048"],
]


def measured(script: str, kept: str, *arguments: str) -> list[str]:
    """Run a script of data/ with --json, append its rows to a file, and return them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(ROOT / "data" / script), "--json", str(out), *arguments]
        subprocess.run(command, check=True, cwd=ROOT)
        lines = out.read_text(encoding="utf-8").splitlines()
    with (KEPT / kept).open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    return lines


def evaluated(kept: str, *model: str) -> Iterator[dict]:
    """Rows of data/evaluate.py for the embedded model, or for another one."""
    runs = [["--n", str(N), *run] for run in RUNS]
    if "LONGEVAL" in os.environ:
        runs.append(["--tasks", "--lengths", "--longeval", os.environ["LONGEVAL"]])
    for run in runs:
        yield from map(json.loads, measured("evaluate.py", kept, *run, *model))


def answers() -> list[Claim]:
    """Full cache, held-out documents, with 95 % intervals and the partial-key floor."""
    if "LONGEVAL" not in os.environ:
        print("not checked | LongEval cases | name their file with LONGEVAL=FILE")
    claims, shipped = [], {}
    for row in evaluated("evaluation.jsonl"):
        shipped[row["name"]] = row
        floor = "" if row["floor"] is None else f", partial-key floor {row['floor']:.3f}"
        figure = f"{row['exact']:.3f} [{row['low']:.3f}, {row['high']:.3f}], {row['tokens_right']:.3f} of tokens"
        bar, met = bar_of(row)
        claims.append(Claim(f"{row['name']}, exact match (n={row['n']}{floor})", figure, bar, bool(met)).show())
    if "AGAIN" not in os.environ:
        print("not checked | that training again gives the same accuracy | name the trained model with AGAIN=FOLDER")
        return claims
    for row in evaluated("again.jsonl", "--model", os.environ["AGAIN"]):
        low, high = shipped[row["name"]]["low"], shipped[row["name"]]["high"]
        text, bar = f"{row['name']}, trained again (n={row['n']})", f"the shipped model's {low:.3f} to {high:.3f}"
        claims.append(Claim(text, f"{row['exact']:.3f}", bar, low <= row["exact"] <= high).show())
    return claims


def attention() -> list[Claim]:
    """Accuracy under restricted attention, and head statistics."""
    found = json.loads(measured("attention.py", "attention.json", "--n", str(N))[0])
    score = {(task, policy, share): value for task, policy, share, _, value in found["accuracy"]}
    tasks, claims = list(dict.fromkeys(task for task, *_ in score)), []
    for task in tasks:
        full, tenth = score[task, "full", 1.0], score[task, "top", 0.1]
        text = f"{task}: true top 10 % (n={N})"
        claims.append(Claim(text, f"{tenth:.3f}", f"99 % of full, {full:.3f}", tenth >= 0.99 * full).show())
        for policy in ("window", "random"):
            value = score[task, policy, 0.1]
            claims.append(Claim(f"{task}: {policy} 10 %", f"{value:.3f}", "half of full", value <= full / 2).show())
    falls = {task: score[task, "top", 0.1] - score[task, "top", 0.01] for task in tasks}
    gradual = {task: fall for task, fall in falls.items() if fall >= 0.05}
    figure = ", ".join(f"{task} by {fall:.3f}" for task, fall in gradual.items()) or "none"
    text = "tasks whose true top 1 % is 5 points below the true top 10 %"
    claims.append(Claim(text, figure, "two tasks", len(gradual) >= 2).show())
    sinks = sum(head[3] >= 0.1 for head in found["heads"])
    claims.append(Claim("heads with 10 % of their mass on the first tokens", str(sinks), "1", sinks >= 1).show())
    least = min(head[6] for head in found["heads"])
    text = "no dead heads: least share of what the heads of a layer write"
    claims.append(Claim(text, f"{least:.3f}", "0.010", least >= 0.01).show())
    worse = [row for row in found["first tokens"] if row["difference"][1] > 0]
    figure = ", ".join("{task} {difference[0]:.3f}".format(**row) for row in worse) or "none"
    text = "tasks whose answers a 20 % window that holds the fact gives a higher loss without the first tokens"
    return [*claims, Claim(text, figure, "one interval above 0", bool(worse)).show()]


def streaming() -> list[Claim]:
    """The `streaming` system with and without its sinks, on documents whose window holds the fact."""
    model, tokenizer = load_embedded()
    policy = POLICIES["streaming"]
    ways = {"with": (policy, Settings(alpha=0.2)), "without": (policy, Settings(alpha=0.2, sinks=0))}
    right = dict.fromkeys(ways, 0)
    for record in islice(in_window("passage", 1024, 0.2, seed=20), N):
        for way, answer in ask_each(model, tokenizer, record, ways).items():
            right[way] += is_right(record, answer.text)
    figure = f"{right['without'] / N:.3f} against {right['with'] / N:.3f} with"
    text = f"passage, `streaming` at alpha 0.2 without its sinks, fact in the window (n={N})"
    return [Claim(text, figure, "0.05 below", right["without"] <= right["with"] - 0.05 * N).show()]


if __name__ == "__main__":
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    sys.exit(verdict(answers() + attention() + streaming()))
