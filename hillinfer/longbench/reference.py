"""What a known model scored elsewhere with its full cache, and what a wrong set-up looks like."""

import re
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

FAR = 8.0  # points below a published score that no difference between papers explains
ROWS = {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500, "longbench-v2": 503}  # of others 200, E split 300
ROWS |= {"multifieldqa_en_e": 150, "qasper_e": 224, "multi_news_e": 294}


@cache
def published() -> dict[str, tuple[str, dict[str, float]]]:
    """Model -> source, and score by task."""
    file = tomllib.loads(Path(__file__).with_name("reference.toml").read_text())
    return {
        m["name"]: (m["source"], {t: s for t, s in zip(file["tasks"], m["scores"], strict=True) if not np.isnan(s)})
        for m in file["model"]
    }


def find(model: str) -> str | None:
    """The published model that a folder's or hub's name stands for: `meta-llama/Meta-Llama-3.1-8B-Instruct` too."""
    plain = lambda text: re.sub("[^a-z0-9]", "", text.lower())  # noqa: E731
    given = plain(model.rstrip("/").rpartition("/")[2]).removeprefix("meta").removesuffix("hf")
    return next((name for name in published() if plain(name) == given), None)


def warnings_of(frame: pd.DataFrame, table: pd.DataFrame, manifest: dict) -> list[str]:
    """Lines for the report: published scores beside ours, and whatever makes ours less than they seem."""
    lines, settings = [], manifest["settings"]
    long = frame[frame.suite.str.startswith("longbench")]
    counts = long[long.system == "full"].groupby(["model", "task"]).size().groupby("task").max()
    whole = {task: ROWS.get(task, 300 if task.endswith("_e") else 200) for task in counts.index}
    if parts := [f"{task} {n} of {whole[task]}" for task, n in counts.items() if n < whole[task]]:
        lines.append(f"Subset, no LongBench scores: {', '.join(parts)} rows.")
    if frame.suite.eq("own").all():
        lines.append("These are the project's own tasks, no LongBench scores.")
    prompts = frame.drop_duplicates(["model", "task", "id"])
    told = f"{len(prompts)} prompts of {prompts.prompt_tokens.min()} to {prompts.prompt_tokens.max()} tokens"
    if (cut := prompts[prompts.truncated]).size:
        told += f"; {len(cut)} of them were cut in the middle, from up to {cut.original_tokens.max()} tokens to "
        told += f"{cut.prompt_tokens.min()} to {cut.prompt_tokens.max()}"
    lines.append(told + ".")
    if again := int(prompts.cut_again.sum()):
        lines.append(
            f"{again} prompts were still too long for the model after LongBench's cut (chat template, or characters of "
            "several tokens) and were cut once more, by tokens."
        )
    if settings["question"] == "prefilled" and frame.system.nunique() > 1:
        lines.append("The question was prefilled, which attends to everything: the first token flatters every system.")
    for model in frame.model.unique():
        own = table[(table.model == model) & (table.bucket == "")]
        lines += _of_model(model, own, manifest["models"][model]["chat"], len(long) > 0)
    return lines


def _of_model(model: str, table: pd.DataFrame, chat: bool, long: bool) -> list[str]:
    lines = []
    if long and not chat and re.search("instruct|chat", model.lower()):
        lines.append(
            f"WARNING: {model} was asked without a chat template. Llama-3.1-8B-Instruct has 16 instead of 56 on "
            "hotpotqa that way: take a tokenizer with a template, and leave out --no-chat."
        )
    if (name := find(model)) is None:
        return lines
    source, scores = published()[name]
    ours = table[table.system == "full"].set_index("task").score
    pairs = {task: (ours[task], score) for task, score in scores.items() if task in ours}
    if pairs:
        told = ", ".join(f"{task} {own:.1f} ({score:.1f})" for task, (own, score) in pairs.items())
        lines.append(f"{model} with full, and published for {name} ({source}) in brackets: {told}.")
    if low := [task for task, (own, score) in pairs.items() if own < score - FAR]:
        lines.append(
            f"WARNING: {', '.join(low)} far below the published score: the set-up looks wrong. Check the chat "
            "template, the prompt limit, dtype and the number of samples."
        )
    return lines
