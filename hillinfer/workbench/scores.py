"""What the accuracy board shows: a row of figures for each variant, and a sample's answers side by side."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from hillinfer.longbench import report
from hillinfer.longbench.fidelity_table import fidelity

NAMES = dict(kv="KV_attended_KiB_per_token", drive="drive_KiB_per_token", ms="ms_per_token", attended="attended_%")


def score_rows(rows: Sequence[dict], planned: int = 0) -> list[dict]:
    """A dict for each variant in the order of their first results.

    planned  samples that each variant is asked; 0 if unknown

    `tasks` maps each task to its score in %, `score` is their mean; `low`, `high` and `diff*` as in `report.scores`;
    `kl` (nats) and `agree` (%) as in `fidelity_table.fidelity`; `kv` and `drive` in KiB a token, `ms` a
    token, `attended` in %. None where nothing was measured.
    """
    if not rows:
        return []
    frame = report.frame_of(list(rows))
    kept = fidelity(frame)
    if len(kept):
        kept = kept[kept.answer == kept.answer.iloc[0]]  # one forced answer: the reference if it was measured
    table, cost = report.scores(frame), report.costs(frame)
    order = list(dict.fromkeys((r["model"], r["question"], r["system"], float(r["alpha"] or 1)) for r in rows))
    out = []
    for variant in order:
        named = dict(zip(report.VARIANT, variant, strict=True))
        mine, paid, close = (_rows(part, named) for part in (table, cost, kept))
        row = named | {"n": sum(_variant(r) == variant for r in rows), "planned": planned}
        row["tasks"] = {r.task: r.score for r in mine.itertuples() if not r.bucket and not r.task.startswith("average")}
        average = mine[mine.task == report.AVERAGE]
        for name in ("score", "low", "high", "diff", "diff_low", "diff_high", "p"):
            row[name] = _first(average, name)
        for name in ("kl", "kl_low", "kl_high", "agree"):
            row[name] = _first(close, name)
        row |= {short: _first(paid, name) for short, name in NAMES.items()}
        if named["system"] == "full":
            row |= dict.fromkeys(("diff", "diff_low", "diff_high", "p"))
        out.append(row)
    return out


def _variant(row: dict) -> tuple:
    return row["model"], row["question"], row["system"], float(row["alpha"] or 1)


def _rows(table, named: dict):
    for name, value in named.items() if len(table) else ():
        table = table[table[name] == value]
    return table


def _first(table, name: str) -> float | None:
    value = table[name].iloc[0] if len(table) and name in table else None
    return None if value is None or np.isnan(value) else round(float(value), 4)


def pieces_of(tokenizer) -> Callable[[str], list[str]]:
    """Cuts a text into the texts of its tokens; into words without a tokenizer."""

    def pieces(text: str) -> list[str]:
        if tokenizer is None:
            return re.findall(r"\s*\S+|\s+$", text)
        marks = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        ends = [end for _, end in marks]
        return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    return pieces


def parting(one: Sequence[str], other: Sequence[str]) -> int | None:
    """Index of the first piece in which two answers differ; None if they are the same."""
    differing = (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, None if len(one) == len(other) else min(len(one), len(other)))


def answers_of(rows: Sequence[dict], task: str, sample: str, record: dict | None, tokenizer=None) -> dict:
    """One sample's question, references and the answers of every variant, each with the token at which it parts from
    `full`'s: `same` is the text up to there, `parts` the index of the token (None: it does not), `rest` the others.

    record     the sample as from `sources.load`; None if it is not at hand
    tokenizer  the model's; None compares words
    """
    mine, pieces = [row for row in rows if (row["task"], row["id"]) == (task, sample)], pieces_of(tokenizer)
    full = {(r["model"], r["question"]): pieces(r["pred"] or "") for r in mine if r["system"] == "full"}
    answers = []
    for row in mine:
        own = pieces(row["pred"] or "")
        base = full.get((row["model"], row["question"]))
        at = None if base is None else parting(base, own)
        cut = len(own) if at is None else at
        known = {name: row[name] for name in ("model", "question", "system", "alpha", "score", "new_tokens")}
        known |= dict(same="".join(own[:cut]), token="".join(own[cut : cut + 1]), rest="".join(own[cut + 1 :]))
        answers.append(known | {"parts": at, "compared": base is not None})
    about = {"task": task, "id": sample, "answers": answers, "unit": "word" if tokenizer is None else "token"}
    about |= {"input": record["input"] if record else None, "reference": mine[0]["answers"] if mine else []}
    return about | {"length": mine[0]["length"] if mine else 0, "tokens": mine[0]["prompt_tokens"] if mine else 0}
