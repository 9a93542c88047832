"""`make show-longbench`: measure all machine-checkable claims about the accuracy benchmark.

ROWS=FOLDER   real LongBench rows, with metric_cases.jsonl and official/; claims that need them fail without it
SAMPLES=n     samples per bundled task in the full table (10)
MINUTES=m     time limit of the full table (60)
OUT=FOLDER    folder of the full table; an interrupted run resumes there
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.claims import Claim, tests, verdict
from hillinfer.assets import data_folder
from hillinfer.loading import model_path
from hillinfer.longbench import prompts, sources, sweep
from hillinfer.longbench.job import EvalSettings, Job, run_job
from hillinfer.longbench.metrics import score
from hillinfer.longbench.models import load_model
from hillinfer.longbench.results import KEY, read
from hillinfer.longbench.tasks import find_task, longbench
from hillinfer.systems.registry import list_systems
from tests.longbench_rows import write_model

ROWS = Path(os.environ["ROWS"]) if os.environ.get("ROWS") else None
SAMPLES = os.environ.get("SAMPLES", "10")
MINUTES = float(os.environ.get("MINUTES", "60"))
ALPHAS = "0.05,0.1,0.2,0.5"
SMALL = ["--tasks", "lines_1k,needle_1k,passage_1k", "--samples", "2", "--systems", "all", "--alpha", "0.1,0.2"]


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if ROWS is not None:
        os.environ["LONGBENCH_ROWS"] = str(ROWS)  # for the tests
    claims = [
        tests("metrics: every trap of the official code", "tests/test_longbench_metrics.py").show(),
        tests("prompts, rows, loading order, offline errors", "tests/test_longbench_prompts.py").show(),
        tests("runner: resumed, extended, refused, compared", "tests/test_longbench_eval.py").show(),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if ROWS is None:
            claims.append(Claim("real rows", "no ROWS=FOLDER was given", "checked", False).show())
        else:
            claims += [official_scores(), official_prompts(), *real_rows(folder)]
        claims += [saving(), *same_tables(folder), *whole_table(folder)]
    return verdict(claims)


def official_scores() -> Claim:
    """The official code's score of real predictions."""
    lines = (ROWS / "metric_cases.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    errors = [abs(score(find_task(c["task"]), c["pred"], c["answers"], c["all_classes"]) - c["score"]) for c in cases]
    text = f"official score of {len(cases)} real predictions, largest error"
    return Claim(text, f"{max(errors):.1e}", "1e-6", max(errors) <= 1e-6).show()


def official_prompts() -> Claim:
    """Templates, lengths and middle truncation on real rows, against a reimplementation of pred.py."""
    tokenizer = AutoTokenizer.from_pretrained(data_folder("model"))
    templates = json.loads((ROWS / "official" / "dataset2prompt.json").read_text(encoding="utf-8"))
    lengths = json.loads((ROWS / "official" / "dataset2maxlen.json").read_text(encoding="utf-8"))
    checked = wrong = 0
    for task in (longbench()[name] for name in templates if (ROWS / f"{name}.jsonl").exists()):
        wrong += task.template != templates[task.name] or task.max_new_tokens != lengths[task.name]
        for record in sources.load(task, [ROWS])[0][:2]:
            text = templates[task.name].format(**record)
            for limit in (500, 3500, 7500, 15500, 31500):
                wanted = official(tokenizer, text, limit)
                wrong += prompts.build(task, record, tokenizer, limit, chat=False).ids != wanted
                checked += 1
    text = f"{checked} prompts of real rows at five windows, different from the official rule's"
    return Claim(text, str(wrong), "0", wrong == 0 and checked > 100).show()


def official(tokenizer, text: str, max_length: int) -> list[int]:
    """THUDM/LongBench, pred.py."""
    ids, half = tokenizer(text).input_ids, int(max_length / 2)
    if len(ids) <= max_length:
        return ids
    halves = ids[:half], ids[-half:]
    return tokenizer("".join(tokenizer.decode(part, skip_special_tokens=True) for part in halves)).input_ids


def real_rows(folder: Path) -> list[Claim]:
    """A complete eval of a Hugging Face folder (random weights) on real rows of 20 tasks."""
    names = [task.name for task in longbench().values() if (ROWS / f"{task.name}.jsonl").exists()]
    model, out = write_model(folder / "model", window=8192), folder / "real"
    words = ["--model", str(model), "--data", str(ROWS), "--tasks", ",".join(names), "--samples", "1"]
    seconds = evaluate(*words, "--systems", "streaming,hillinfer", "--alpha", "0.1", "--out", str(out))
    rows = read(out)
    tokenizer, odd = AutoTokenizer.from_pretrained(model), 0
    for row in rows:
        task = find_task(row["task"])
        record = next(r for r in sources.load(task, [ROWS])[0] if r["_id"] == row["id"])
        text = task.template.format(**record)
        before, after = len(tokenizer(text).input_ids), len(official(tokenizer, text, 7500))
        room = 8192 - task.max_new_tokens
        odd += (row["original_tokens"], row["truncated"]) != (before, before > 7500)
        odd += row["prompt_tokens"] != (after if after <= room else room // 2 * 2)
    text = f"{len(rows)} answers on real rows of {len(names)} tasks, {seconds:.0f} s; unexpected token counts"
    complete = len(names) == 20 and len(rows) == 60
    claims = [Claim(text, str(odd), "0 of 60, 20 tasks", complete and odd == 0).show()]
    counts = ", ".join(
        f"{r['task']} {r['original_tokens']}>{r['prompt_tokens']}" for r in rows if r["system"] == "full"
    )
    print(f"       | tokens before and after the cut: {counts}")
    return claims


def saving() -> Claim:
    """Shared against separate prefills of a sample's variants, including decode, on the embedded model."""
    variants = tuple(sweep.variants_of(list_systems(), [float(word) for word in ALPHAS.split(",")], {}))
    ratios, different = {}, 0
    for name in ("lines_2k", "lines_4k"):
        task, times, answers = find_task(name), [], []
        for share in (True, False):
            settings = EvalSettings(share_prefill=share)
            job = Job("embedded", model_path("embedded"), task, sources.load(task)[0][0], variants, settings)
            load_model(job.path, settings.dtype, settings.threads, settings.seed)  # not in the time
            rows = run_job(job)
            times.append(sum(row["seconds"] for row in rows))
            answers.append([row["pred"] for row in rows])
        different += sum(a != b for a, b in zip(*answers, strict=True))
        ratios[name] = times[1] / times[0]
    text = (
        f"one sample, {len(variants)} variants of {len(list_systems())} systems: time with separate over shared prefill"
    )
    figure = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in ratios.items()) + f"; answers that differ: {different}"
    return Claim(text, figure, "above 3x, 0 differ", min(ratios.values()) > 3 and not different).show()


def same_tables(folder: Path) -> list[Claim]:
    """Without interruption, killed at random moments, on two processes and on two Dask workers."""
    from distributed import LocalCluster

    whole = folder / "whole"
    seconds = evaluate(*SMALL, "--out", str(whole))
    rng, kills = random.Random(time.time_ns()), 0
    killed = folder / "killed"
    while True:
        process, before = start(*SMALL, "--workers", "2", "--out", str(killed)), size(killed)
        while process.poll() is None and size(killed) == before:  # each run gets somewhere, and then dies
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0, seconds / 6))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    evaluate(*SMALL, "--workers", "2", "--out", str(killed))
    claims = [same(whole, killed, f"killed {kills} times at random", kills > 0)]
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        evaluate(*SMALL, "--cluster", f"dask:{address}", "--out", str(folder / "dask"))
    return [*claims, same(whole, folder / "dask", "on two Dask workers", True)]


def size(folder: Path) -> int:
    """Bytes of results."""
    path = folder / "results.jsonl"
    return path.stat().st_size if path.exists() else 0


def same(one: Path, other: Path, text: str, met: bool) -> Claim:
    tables = [(folder / "scores.csv").read_bytes() for folder in (one, other)]
    different = sum(a != b for a, b in zip(*(table.splitlines() for table in tables), strict=False))
    counts = [Counter(tuple(row[name] for name in KEY) for row in read(folder)) for folder in (one, other)]
    odd = (counts[0] - counts[1]).total() + (counts[1] - counts[0]).total()
    text = f"table of {len(tables[0].splitlines()) - 1} lines, {text}: lines that differ, answers repeated or lost"
    met &= tables[0] == tables[1] and not odd
    return Claim(text, f"{different}, {odd} of {counts[0].total()}", "0, byte for byte", met).show()


def whole_table(folder: Path) -> list[Claim]:
    """All systems, bundled tasks and four alphas with one command."""
    out = Path(os.environ.get("OUT", folder / "all"))
    earlier = sum(row["seconds"] for row in read(out)) / 2 if out.exists() else 0.0
    words = ["--systems", "all", "--alpha", ALPHAS, "--samples", SAMPLES, "--workers", "2", "--out", str(out)]
    print(f"       | hillinfer eval {' '.join(words)}", flush=True)
    seconds = evaluate(*words, quiet=False) + earlier
    table = pd.read_csv(out / "scores.csv")
    average = table[table.task == "average"]
    systems, bounded = set(average.system), average.low.notna().all() and average.p.notna().all()
    figures = (out / "report.html").read_text(encoding="utf-8").count("plotly-graph-div")
    text = (
        f"{len(read(out))} answers of {len(systems)} systems on {table.task.nunique() - 1} own tasks, n={SAMPLES} each"
    )
    met = seconds <= 60 * MINUTES and systems == set(list_systems()) and bounded and figures >= 3
    print((out / "report.md").read_text(encoding="utf-8").partition("\n| ")[2].partition("\n\n")[0])
    figure = f"{seconds / 60:.1f} minutes, {figures} figures, {'all' if bounded else 'not all'} with intervals"
    if earlier:
        figure += f"; {earlier / 60:.1f} of the minutes are half of what the answers found in {out} had taken"
    return [Claim(text, figure, f"{MINUTES:.0f} minutes on two cores", met).show()]


def evaluate(*words: str, quiet: bool = True) -> float:
    """Run `hillinfer eval`, which must succeed, and return its seconds."""
    began = time.perf_counter()
    process = start(*words, quiet=quiet)
    if process.wait():
        raise SystemExit(f"hillinfer eval {' '.join(words)} failed")
    return time.perf_counter() - began


def start(*words: str, quiet: bool = True) -> subprocess.Popen:
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if quiet else None)
    return subprocess.Popen([sys.executable, "-m", "hillinfer", "eval", *words], **options)


if __name__ == "__main__":
    sys.exit(main())
