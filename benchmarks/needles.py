"""Needles with three distractors in real text: right answers and fidelity of several systems at several lengths.

    python -m benchmarks.needles FOLDER_OR_HUB_ID --tokens 1500,4000,8000 --n 20

Each question's document is prefilled once, exactly; every system then takes the question token by token, and after it
the reference answer, all as rows of one decode. A stopped run resumes: --out keeps a line for each answer.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, astuple
from pathlib import Path

import pandas as pd

from hillinfer.assets import machine
from hillinfer.commands.console import split_list
from hillinfer.errors import UsageError
from hillinfer.loading import load_model
from hillinfer.longbench.forced import Forced, force_each
from hillinfer.longbench.job import FULL, Variant
from hillinfer.longbench.models import describe
from hillinfer.longbench.needles import TASK, make_needles, needle_prompt
from hillinfer.longbench.results import Results
from hillinfer.systems.registry import list_systems
from hillinfer.systems.shapes import window_of

VARIANTS = [FULL, Variant("hillinfer", 0.1), Variant("hillinfer", 0.05)]
VARIANTS += [Variant(name, 0.1) for name in ("leoam", "quest", "streaming")]
SEED = 42


def options_of(variant: Variant, drive: Path) -> dict:
    """A drive only for what needs one: where the KV lies changes no answer."""
    options = {} if variant.alpha is None else {"alpha": variant.alpha}
    return options | ({"drive": drive} if list_systems()[variant.system].needs_drive else {})


def row_of(forced: Forced, variant: Variant, model: str, record: dict, tokens: int) -> dict:
    answer = forced.answer
    row = dict(model=model, task=TASK.name, id=record["_id"], tokens=tokens) | asdict(variant)
    row |= dict(prompt_tokens=answer.prompt_tokens, answer=record["answers"][0], pred=answer.text)
    row |= dict(right=forced.right, kl=forced.kl, agree=forced.agree, attended=answer.attended)
    return row | dict(drive_bytes_per_token=answer.drive_bytes_per_token, memory_bytes=answer.memory_bytes)


def measure(name: str, lengths: list[int], n: int, results: Results, drive: Path) -> None:
    """Answer what `results` lacks, and print a line for each question."""
    model, tokenizer = load_model(name)
    if (window := window_of(model.config)) and (longest := max(lengths) + TASK.max_new_tokens) > window:
        raise UsageError(f"{longest:,} tokens, the answer included, exceed the model's {window:,}: lower --tokens")
    jobs = [(tokens, record) for tokens in lengths for record in make_needles(tokenizer, tokens, n, SEED)]
    ways = {str(variant): (variant.system, options_of(variant, drive)) for variant in VARIANTS}
    for i, (tokens, record) in enumerate(jobs, 1):
        missing = [v for v in VARIANTS if (name, TASK.name, record["_id"], *astuple(v)) not in results.done()]
        if not missing:
            continue
        start = time.perf_counter()
        found = force_each(model, tokenizer, *needle_prompt(tokenizer, record), ways, together=True)
        rows = [row_of(*pair, name, record, tokens) for pair in zip(found, VARIANTS, strict=True) if pair[1] in missing]
        results.append(rows)
        right = ", ".join(str(variant) for variant, row in zip(missing, rows, strict=True) if row["right"])
        print(f"{i}/{len(jobs)}, {tokens} tokens, {time.perf_counter() - start:.0f} s, right: {right}", flush=True)


def table_of(rows: list[dict]) -> pd.DataFrame:
    """One row per model, length and system."""
    groups = pd.DataFrame(rows).fillna({"alpha": 1}).groupby(["model", "tokens", "system", "alpha"], sort=False)
    return groups.agg(
        right=("right", "sum"),
        of=("right", "size"),
        KL=("kl", "mean"),
        agree=("agree", "mean"),
        attended=("attended", "mean"),
        drive_KiB_per_token=("drive_bytes_per_token", lambda size: size.mean() / 1024),
        memory_MiB=("memory_bytes", lambda size: size.max() / 2**20),
    ).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--tokens", default="1500,4000,8000", help="lengths of the prompts, separated by commas")
    parser.add_argument("--n", type=int, default=20, help="questions of each length")
    parser.add_argument("--drive", type=Path, help="folder on the drive; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("out/needles"))
    words = parser.parse_args()
    lengths, models = split_list(words.tokens, int), {words.model: describe(words.model, None)}
    with Results(words.out) as results, tempfile.TemporaryDirectory(dir=words.drive) as drive:
        results.begin({"seed": SEED}, models, [], sys.argv, machine())
        measure(words.model, lengths, words.n, results, Path(drive))
        print(table_of(results.rows).to_string(index=False, float_format="%.3g"))
    print(f"measured on {machine()}; {words.out}/results.jsonl")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
