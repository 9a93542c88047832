"""Every claim about real models, measured again: make show-real MODELS=FOLDER ROWS=FOLDER

MODELS holds a folder for each of smollm2, qwen05 and gemma3, with `model.gguf` and, dense, `hf`; ROWS LongBench rows.
The evaluation of all rows takes hours on two cores; it resumes in out/real, where a finished one is only read.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import needles, one_decode
from benchmarks.claims import Claim, tests, verdict
from hillinfer.assets import machine
from hillinfer.commands.app import app
from hillinfer.loading import load_model
from hillinfer.longbench.job import EvalSettings, Job, run_job
from hillinfer.longbench.report import frame_of, scores
from hillinfer.longbench.results import Results, read
from hillinfer.longbench.sources import load_all
from hillinfer.longbench.sweep import variants_of
from hillinfer.longbench.tasks import BUNDLED

OUT = Path("out/real")
SYSTEMS = "topk,leoam,quest,h2o,snapkv,infinigen,streaming,oracle,random"
PROMPT = "Question: What is the capital of France, and what is it known for? Answer: The capital"


def gguf(models: Path) -> list[Claim]:
    """Every file answers through the command."""
    claims = []
    for path in sorted(models.glob("*/model.gguf")):
        words = ["run", "--model", path, "--prompt", PROMPT, "--max-new-tokens", "8", "--drive", OUT]
        done = subprocess.run([sys.executable, "-m", "hillinfer", *map(str, words)], capture_output=True, text=True)
        answer = " ".join(done.stdout.split())
        claims.append(
            Claim(f"{path.parent.name}: a GGUF file answers", answer, "of France is Paris", "Paris" in answer)
        )
    return [claim.show() for claim in claims]


def one(model, tokenizer, rows: Path) -> Claim:
    found = one_decode.measure(model, tokenizer, rows, "gov_report", 6000, 3, 16)
    ratios = sorted(alone / own for own, alone in zip(found["together"], found["one by one"], strict=True))
    figure = f"{ratios[1]:.1f} ({ratios[0]:.1f} to {ratios[2]:.1f}), {found['differ']} answers differ"
    return Claim(f"{found['ways']} ways in one decode, times as fast as one by one", figure, "6", ratios[1] >= 6).show()


def same_scores() -> Claim:
    """On the embedded model's tasks, rows of one decode score as each system alone."""
    variants, differ, total = variants_of(["topk", "leoam", "h2o", "streaming"], [0.1, 0.2], {}), 0, 0
    for task, records, _ in load_all([BUNDLED], [], "main"):
        ways = []
        for times in (False, True):
            job = Job("embedded", "embedded", task, records[0], tuple(variants), EvalSettings(times=times))
            ways.append([row["score"] for row in run_job(job)])
        differ, total = differ + sum(a != b for a, b in zip(*ways, strict=True)), total + len(variants)
    return Claim("the same scores in one decode and alone", f"{differ} of {total} differ", "0", differ == 0).show()


def found_needles(name: str) -> list[Claim]:
    with Results(OUT / "needles") as results:
        results.begin({"seed": needles.SEED}, {name: needles.describe(name, None)}, [], sys.argv, machine())
        needles.measure(name, [1500, 4000, 8000], 20, results, OUT)
        table = needles.table_of(results.rows)
    print(table.to_string(index=False, float_format="%.3g"))
    right = table.pivot_table(index="tokens", columns=["system", "alpha"], values="right")
    claims = []
    for tokens, row in right.iterrows():
        figure = ", ".join(f"{system} {alpha:g} {value:.0f}" for (system, alpha), value in row.items())
        least = min(row["hillinfer", 0.1], row["hillinfer", 0.05])
        met = least >= row["full", 1.0] - 1 and row["streaming", 0.1] < least
        claims.append(
            Claim(f"needles, {tokens} tokens, right of 20", figure, "hillinfer as full, less one", met).show()
        )
    return claims


def accuracy(name: str, rows: Path) -> list[Claim]:
    tasks = ",".join(sorted(path.stem for path in rows.glob("*.jsonl") if path.stem != "metric_cases"))
    words = ["eval", "--model", name, "--tasks", tasks, "--data", rows, "--samples", "0", "--max-length", "7500"]
    words += ["--systems", SYSTEMS, "--alpha", "0.2,0.1,0.05", "--question", "both", "--fidelity", "reference"]
    app([str(word) for word in [*words, "--threads", "2", "--out", OUT / "eval"]], standalone_mode=False)
    table = scores(frame_of(read(OUT / "eval")))
    average = table[(table.task == "average") & (table.system == "topk") & (table.alpha == 0.1)]
    claims = []
    for row in average.itertuples():
        figure = f"{row.diff:+.1f} [{row.diff_low:+.1f}, {row.diff_high:+.1f}] of {row.n} rows"
        text = f"hillinfer's selection at 0.1, question {row.question}: points to full, mean over tasks"
        claims.append(Claim(text, figure, "-1", row.diff >= -1).show())
    return claims


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--parts", default="gguf,errors,scores,one,needles,accuracy")
    words = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    name, claims = str(words.models / "qwen05" / "hf"), []
    parts = {
        "gguf": lambda: gguf(words.models),
        "errors": lambda: [
            tests("broken and unsupported files: one line that names the fix", "tests/test_loading.py").show()
        ],
        "scores": lambda: [same_scores()],
        "one": lambda: [one(*load_model(name), words.rows)],
        "needles": lambda: found_needles(name),
        "accuracy": lambda: accuracy(name, words.rows),
    }
    for part in words.parts.split(","):
        claims += parts[part]()
    print(machine())
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
