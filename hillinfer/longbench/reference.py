"""Published full-cache scores of known models, and warnings about a wrong setup."""

import re
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

FAR = 8.0  # points below a published score: more than papers differ by
ROWS = {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500, "longbench-v2": 503}  # others: 200, E split: 300
ROWS |= {"multifieldqa_en_e": 150, "qasper_e": 224, "multi_news_e": 294}


@cache
def published() -> dict[str, tuple[str, dict[str, float]]]:
    """Maps a model's name to its source and its scores by task."""
    file = tomllib.loads(Path(__file__).with_name("reference.toml").read_text(encoding="utf-8"))
    return {
        m["name"]: (m["source"], {t: s for t, s in zip(file["tasks"], m["scores"], strict=True) if not np.isnan(s)})
        for m in file["model"]
    }


def find(model: str) -> str | None:
    """The published model behind a local folder or Hub name, such as `meta-llama/Meta-Llama-3.1-8B-Instruct`."""
    plain = lambda text: re.sub("[^a-z0-9]", "", text.lower())  # noqa: E731
    given = plain(model.rstrip("/").rpartition("/")[2]).removeprefix("meta").removesuffix("hf")
    return next((name for name in published() if plain(name) == given), None)


def warnings_of(frame: pd.DataFrame, table: pd.DataFrame, manifest: dict) -> list[str]:
    """Caveats for the report, and a comparison with published scores."""
    lines = []
    long = frame[frame.suite.str.startswith("longbench")]
    counts = long[long.system == "full"].groupby(["model", "task"]).size().groupby("task").max()
    whole = {task: ROWS.get(task, 300 if task.endswith("_e") else 200) for task in counts.index}
    if parts := [f"{task} {n} of {whole[task]}" for task, n in counts.items() if n < whole[task]]:
        lines.append(f"Subset, not comparable with LongBench scores: {', '.join(parts)} rows.")
    if frame.suite.eq("own").all():
        lines.append("These are the project's own tasks, not LongBench scores.")
    prompts = frame.drop_duplicates(["model", "task", "id"])
    line = f"{len(prompts)} prompts of {prompts.prompt_tokens.min()} to {prompts.prompt_tokens.max()} tokens"
    if (cut := prompts[prompts.truncated]).size:
        line += f"; {len(cut)} of them were truncated in the middle, from up to {cut.original_tokens.max()} tokens to "
        line += f"{cut.prompt_tokens.min()} to {cut.prompt_tokens.max()}"
    lines.append(line + ".")
    if recut := int(prompts.cut_again.sum()):
        lines.append(
            f"{recut} prompts were still too long for the model after LongBench's truncation (chat template, or "
            "multi-token characters) and were truncated again, by tokens."
        )
    if (frame.question == "prefilled").any() and frame.system.nunique() > 1:
        lines.append(
            "The question was prefilled with full attention: the first answer token favours every selective system."
        )
    for model in frame.model.unique():
        rows = table[(table.model == model) & (table.bucket == "")]
        lines += _model_lines(model, rows, manifest["models"][model]["chat"], len(long) > 0)
    return lines


def _model_lines(model: str, table: pd.DataFrame, chat: bool, long: bool) -> list[str]:
    lines = []
    if long and not chat and re.search("instruct|chat", model.lower()):
        lines.append(
            f"WARNING: {model} was asked without a chat template. Llama-3.1-8B-Instruct drops from 56 to 16 on "
            "hotpotqa that way: use a tokenizer with a template, and leave out --no-chat."
        )
    if (name := find(model)) is None:
        return lines
    source, scores = published()[name]
    ours = table[table.system == "full"].set_index("task").score
    pairs = {task: (ours[task], score) for task, score in scores.items() if task in ours}
    if pairs:
        compared = ", ".join(f"{task} {measured:.1f} ({score:.1f})" for task, (measured, score) in pairs.items())
        lines.append(f"{model} with full; in brackets the scores published for {name} ({source}): {compared}.")
    if low := [task for task, (measured, score) in pairs.items() if measured < score - FAR]:
        lines.append(
            f"WARNING: {', '.join(low)} far below the published score: the setup looks wrong. Check the chat "
            "template, the prompt limit, dtype and the number of samples."
        )
    return lines
