"""Every claim about selection on real models, measured again: make show-selection MODELS=FOLDER ROWS=FOLDER

MODELS holds `qwen05/hf` and `smollm2/hf`; ROWS LongBench rows, of which a row of each task is taken. Two hours on two
cores; it resumes in out/selection.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import selectors
from benchmarks.claims import Claim, tests, verdict
from hillinfer.assets import machine
from hillinfer.loading import load_model
from hillinfer.longbench.sources import load_all

OUT = Path("out/selection")
LAYER, APART, MASS, TURNS = selectors.CODED, f"{selectors.CODED}, per KV head", "mass", "turns"
COARSE = f"{selectors.CODED}, int2"
EXACT_APART = "log-probability, per KV head"
KINDS = [(LAYER, False), (COARSE, False), (MASS, False), (TURNS, False), (LAYER, True), ("log-probability", True)]
SETTINGS = ((False, False), (False, True), (True, False))  # question stepwise, own answers
ALPHAS = [0.1, 0.2]
TOKENS = 7500


def measured(name: str, folder: Path, rows: Path, n: int) -> pd.DataFrame:
    """All rows of one model, from the file of an earlier run as far as it got."""
    path, loaded = OUT / f"{name}.jsonl", None
    done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    have = {(row["task"], row["id"], row["question"], row["answer"]) for row in done}
    names = sorted(file.stem for file in rows.glob("*.jsonl") if file.stem != "metric_cases")
    for task, records, _ in load_all(names, [rows], "main"):
        for record in sorted(records, key=lambda record: len(record["context"]))[:n]:
            for stepwise, own in SETTINGS:
                setting = "stepwise" if stepwise else "exact", "own" if own else "reference"
                if (task.name, record["_id"], *setting) in have:
                    continue
                loaded = loaded or load_model(str(folder))
                new = selectors.measure(*loaded, task, record, ALPHAS, TOKENS, KINDS, stepwise, own)
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
                done += new
                print(f"{name}: {task.name}, question {setting[0]}, {setting[1]} answer", flush=True)
    return pd.DataFrame(done)


def claims_of(name: str, frame: pd.DataFrame) -> list[Claim]:
    table = selectors.table_of(frame.to_dict("records"))
    print(table.to_string(index=False, float_format="%.4f"))
    claims = []

    def claim(text: str, setting: str, alpha: float, one: str, other: str, bar: float) -> None:
        part = frame[(frame.question == setting) & (frame.answer == "reference") & (frame.alpha == alpha)]
        kl = part.assign(sum=part.kl * part.tokens).pivot_table(index="id", columns="rule", values="sum")
        rng, pairs = np.random.default_rng(42), kl[[one, other]].to_numpy()
        drawn = pairs[rng.integers(0, len(pairs), (2000, len(pairs)))].sum(1)
        low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
        ratio = kl[one].sum() / kl[other].sum()
        tokens = part[part.rule == one].tokens.sum()
        figure = f"{ratio:.2f} [{low:.2f}, {high:.2f}], {len(kl)} rows, {tokens} tokens"
        claims.append(Claim(f"{name}, {setting} question, alpha {alpha:g}: {text}", figure, f"{bar}", ratio <= bar))

    for setting in ("exact", "stepwise"):
        claim("KL over that of heads that take turns", setting, 0.1, LAYER, TURNS, 0.5)
        claim("KL over that of the exact mass choice", setting, 0.1, LAYER, MASS, 1.0)
        for alpha in ALPHAS:
            claim("KL of 2-bit codes over that of INT8's", setting, alpha, COARSE, LAYER, 1.35)
        claim("2-bit codes: KL over that of heads that take turns", setting, 0.1, COARSE, TURNS, 1.0)
        claim("per KV head in memory: KL over that of the exact choice", setting, 0.1, APART, EXACT_APART, 1.15)
    for answer, bar in (("own", 0.985), ("reference", 0.91)):
        row = table.query("question == 'exact' and answer == @answer and alpha == 0.1 and rule == @LAYER").iloc[0]
        text = f"{name}, exact question, alpha 0.1: agreement with full on {answer} answers"
        claims.append(Claim(text, f"{row.agree:.3f}, {row.tokens} tokens", f"{bar}", row.agree >= bar))
    return [each.show() for each in claims]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--parts", default="same,qwen05,smollm2")
    parser.add_argument("--n", type=int, default=1, help="rows of each task, shortest first")
    words = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    claims = []
    for part in words.parts.split(","):
        if part == "same":
            text = "host, emulated drive and simulated card select the same"
            claims.append(tests(text, "tests/test_computational.py", "tests/test_codes.py", "tests/test_xrt.py").show())
        else:
            claims += claims_of(part, measured(part, words.models / part / "hf", words.rows, words.n))
    print(machine())
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
