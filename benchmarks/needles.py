"""Needles with three distractors in real text: right answers and fidelity of several systems at several lengths.

    python -m benchmarks.needles FOLDER_OR_HUB_ID --tokens 1500,4000,8000 --n 20

Each question's document is prefilled once, exactly; every system then takes the question token by token, and after it
the reference answer (`hillinfer/longbench/forced.py`). A stopped run resumes: --out keeps a line for each answer.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import astuple
from pathlib import Path

import pandas as pd
import torch

from hillinfer.assets import machine
from hillinfer.commands.console import split_list
from hillinfer.errors import UsageError
from hillinfer.longbench.forced import Forced, force_each
from hillinfer.longbench.models import describe, load_model
from hillinfer.longbench.needles import TASK, make_needles, needle_prompt
from hillinfer.longbench.results import Results
from hillinfer.longbench.sweep import Variant
from hillinfer.systems.registry import list_systems
from hillinfer.systems.shapes import window_of

VARIANTS = [Variant("full", None), Variant("hillinfer", 0.1), Variant("hillinfer", 0.05)]
VARIANTS += [Variant(name, 0.1) for name in ("leoam", "quest", "streaming")]
SEED = 42


def options_of(variant: Variant, drive: Path) -> dict:
    """All systems but `hillinfer` keep their KV in memory: where it lies changes no answer."""
    options = {} if variant.alpha is None else {"alpha": variant.alpha}
    return options | ({"drive": drive} if list_systems()[variant.system].needs_drive else {})


def row_of(forced: Forced, variant: Variant, model: str, record: dict, tokens: int) -> dict:
    answer = forced.answer
    row = dict(model=model, task=TASK.name, id=record["_id"], system=variant.system, alpha=variant.alpha)
    row |= dict(tokens=tokens, prompt_tokens=answer.prompt_tokens, answer=record["answers"][0], pred=answer.text)
    row |= dict(right=forced.right, kl=forced.kl, agree=forced.agree, attended=answer.attended)
    row |= dict(drive_bytes_per_token=answer.drive_bytes_per_token, ms_per_token=answer.ms_per_token)
    return row | dict(prefill_ms=answer.prefill_ms, memory_bytes=answer.memory_bytes)


def measure(name: str, lengths: list[int], n: int, results: Results, drive: Path) -> None:
    """Answer what `results` lacks, a length's questions in turn; a line for each question."""
    model, tokenizer = load_model(name, "auto", torch.get_num_threads(), SEED)
    if (window := window_of(model.config)) and max(lengths) + TASK.max_new_tokens > window:
        raise UsageError(
            f"{max(lengths):,} tokens and an answer exceed the window of {name}, {window:,}: lower --tokens"
        )
    jobs = [(tokens, record) for tokens in lengths for record in make_needles(tokenizer, tokens, n, SEED)]
    for i, (tokens, record) in enumerate(jobs, 1):
        keys = {variant: (name, TASK.name, record["_id"], *astuple(variant)) for variant in VARIANTS}
        if not (missing := [variant for variant in VARIANTS if keys[variant] not in results.done()]):
            continue
        start, (prompt, gold) = time.perf_counter(), needle_prompt(tokenizer, record)
        asked = dict.fromkeys((VARIANTS[0], *missing))  # the others are compared with the first
        ways = {str(variant): (variant.system, options_of(variant, drive)) for variant in asked}
        answers = zip(asked, force_each(model, tokenizer, prompt, gold, ways), strict=True)
        rows = [row_of(forced, variant, name, record, tokens) for variant, forced in answers if variant in missing]
        results.append(rows)
        right = ", ".join(
            f"{row['system']} {row['alpha'] or 1:g} {'right' if row['right'] else 'wrong'}" for row in rows
        )
        print(f"{i}/{len(jobs)}, {tokens} tokens, {time.perf_counter() - start:.0f} s: {right}", flush=True)


def table_of(rows: list[dict]) -> pd.DataFrame:
    """One row per model, length and system."""
    frame = pd.DataFrame(rows).fillna({"alpha": 1})
    groups = frame.groupby(["model", "tokens", "system", "alpha"], sort=False, as_index=False)
    return groups.agg(
        right=("right", "sum"),
        of=("right", "size"),
        KL=("kl", "mean"),
        agree=("agree", "mean"),
        attended=("attended", "mean"),
        drive_KiB_per_token=("drive_bytes_per_token", lambda size: size.mean() / 1024),
        memory_MiB=("memory_bytes", lambda size: size.max() / 2**20),
        ms_per_token=("ms_per_token", "median"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--tokens", default="1500,4000,8000", help="lengths of the prompts, separated by commas")
    parser.add_argument("--n", type=int, default=20, help="questions of each length")
    parser.add_argument("--drive", type=Path, help="folder on the drive; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("out/needles"))
    words = parser.parse_args()
    lengths = split_list(words.tokens, int)
    with Results(words.out) as results, tempfile.TemporaryDirectory(dir=words.drive) as drive:
        results.begin({"seed": SEED}, {words.model: describe(words.model, None)}, [], sys.argv, machine())
        measure(words.model, lengths, words.n, results, Path(drive))
        table = table_of(results.rows)
    print(table.to_string(index=False, float_format="%.3g"))
    print(f"measured on {machine()}; times are medians, {words.out}/results.jsonl")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
