"""Figures for a paper, each one call from the results folder of an eval, with its setting as the caption.

`only` keeps rows with a value, such as `question="stepwise"` where a folder holds both. Save one by `write_image`.
"""

import textwrap
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hillinfer.errors import UsageError
from hillinfer.longbench import report
from hillinfer.longbench.fidelity_table import fidelity
from hillinfer.longbench.results import read, read_manifest
from hillinfer.workbench import evaluation, palette
from hillinfer.workbench.figures import LOG, SHARES
from hillinfer.workbench.observe import AttentionRecord

CAPTION = 118  # characters a line of a caption


def setting_of(folder: str | Path, rows: list[dict] | None = None) -> str:
    """The setting of a folder's rows (by default all) in a sentence: model, samples, question and machine."""
    manifest, rows = read_manifest(Path(folder)), rows or read(Path(folder))
    used = {row["model"] for row in rows}
    models = ", ".join(
        f"{Path(name).name} ({about['dtype']})" for name, about in manifest["models"].items() if name in used
    )
    tasks, samples = sorted({row["task"] for row in rows}), len({(row["task"], row["id"]) for row in rows})
    named = ", ".join(tasks) if len(tasks) <= 6 else f"{len(tasks)} tasks"
    asked = " and ".join(sorted({row["question"] for row in rows}))
    options = ", ".join(f"{name} {value}" for name, value in manifest["settings"].get("options", {}).items())
    text = f"{models}; {samples} samples of {named}; question {asked}; seed {manifest['settings'].get('seed')}"
    return f"{text}{'; ' + options if options else ''}; measured on {manifest['runs'][-1]['hardware']}."


def accuracy_by_budget(folder: str | Path, **only: str) -> go.Figure:
    """Score against the share of tokens attended to, with 95 % bootstrap intervals over samples."""
    return _of_scores(folder, lambda table, cost: evaluation.budget_figure(table, ""), "Score (mean over tasks)", only)


def accuracy_by_bytes(folder: str | Path, **only: str) -> go.Figure:
    """Score against the bytes of KV that a decode step attends to."""
    figure = lambda table, cost: evaluation.bytes_figure(table.merge(cost), "")  # noqa: E731
    return _of_scores(folder, figure, "Score (mean over tasks) by bytes of attended KV", only)


def fidelity_by_budget(folder: str | Path, **only: str) -> go.Figure:
    """KL from full attention against the share of tokens attended to, teacher-forced, with 95 % intervals."""
    return _of_fidelity(folder, None, only)


def fidelity_by_bytes(folder: str | Path, **only: str) -> go.Figure:
    """KL from full attention against the bytes of KV that a decode step attends to."""
    return _of_fidelity(folder, "KV_attended_KiB_per_token", only)


def hits_by_pool(*folders: str | Path) -> go.Figure:
    """Share of the attended tokens served from memory against the KV memory in use, of systems with a drive.

    folders  of one model, such as evals with different `--host-budget`s
    """
    parts = [report.frame_of(read(Path(folder))).assign(folder=str(folder)) for folder in folders]
    frame = pd.concat(parts)
    frame = frame[frame.rates.notna()]
    frame = frame.assign(served=1 - frame.rates.map(lambda rates: rates["drive"]), mib=frame.memory_bytes / 2**20)
    points = frame.groupby(["folder", "system", "alpha"], as_index=False)[["served", "mib"]].mean()
    points = points[points.system.isin(points.system[points.served < 1])]
    if points.empty:
        raise UsageError("no system here kept KV on a drive: run an eval with hillinfer, lru or leoam")
    figure, by = go.Figure(), ["system"] if len(folders) == 1 else ["system", "alpha"]
    for i, (key, line) in enumerate(points.groupby(by)):
        line = line.sort_values("mib")
        name = key[0] if len(key) == 1 else f"{key[0]}, alpha {key[1]:g}"
        style = dict(line_color=palette.line(i)[0], marker_symbol=palette.line(i)[1])
        texts = [f"alpha {alpha:g}" for alpha in line.alpha]
        figure.add_scatter(x=line.mib, y=line.served, name=name, mode="lines+markers", text=texts, **style)
    figure.update_xaxes(title="KV in memory, mean over samples, MiB", **LOG)
    figure.update_yaxes(title="attended tokens from memory", tickformat=".0%")
    return _captioned(figure, "Hit rate by memory", setting_of(folders[0]))


def sparsity_by_model(records: Mapping[str, AttentionRecord | np.ndarray], setting: str = "") -> go.Figure:
    """Heat maps side by side, one for each model: share of tokens that holds 90 % of each head's attention.

    records  model -> its record, or `AttentionRecord.needed()`, (layers, heads)
    """
    arrays = (one.needed() if isinstance(one, AttentionRecord) else np.asarray(one) for one in records.values())
    needed = dict(zip(records, arrays, strict=True))
    figure = make_subplots(1, len(needed), subplot_titles=list(needed), horizontal_spacing=0.06)
    for i, shares in enumerate(needed.values(), 1):
        heat = go.Heatmap(z=np.log10(shares), colorscale="Cividis", zmin=-3, zmax=0, colorbar=SHARES, showscale=i == 1)
        figure.add_trace(heat, 1, i)
        figure.update_xaxes(title="head", row=1, col=i)
        figure.update_yaxes(title="layer" if i == 1 else "", autorange="reversed", row=1, col=i)
    return _captioned(figure, "Tokens that hold 90 % of the attention", setting)


def _of_scores(folder: str | Path, draw: Callable, title: str, only: dict[str, str]) -> go.Figure:
    rows = _rows(folder, only)
    frame = report.frame_of(rows)
    table = report.scores(frame)
    if table.empty:
        raise UsageError(f"{folder} has no answers, only fidelity: use fidelity_by_budget")
    return _captioned(draw(table, report.costs(frame)), title, setting_of(folder, rows))


def _of_fidelity(folder: str | Path, x: str | None, only: dict[str, str]) -> go.Figure:
    rows = _rows(folder, only)
    frame = report.frame_of(rows)
    close = fidelity(frame)
    if close.empty:
        raise UsageError(f"{folder} has no fidelity: run the eval with --fidelity reference")
    close = close[close.answer == close.answer.iloc[0]]
    figure = evaluation.fidelity_figure(close, "")
    if x is not None:
        cost = report.costs(frame).set_index(["system", "alpha"])[x]
        if cost.isna().all():
            raise UsageError(f"{folder} has no answers, and so no bytes: run the eval without --no-answers")
        for trace in figure.data:
            trace.x = [cost[trace.name, row[0]] for row in trace.customdata]
        figure.update_xaxes(title="attended KV, KiB per token (median)")
    title = f"KL from full attention, {close.answer.iloc[0]} answers forced"
    return _captioned(figure, title, setting_of(folder, rows))


def _rows(folder: str | Path, only: dict[str, str]) -> list[dict]:
    """The rows with these values; UsageError unless they are of one model, asked in one way."""
    rows = [row for row in read(Path(folder)) if all(row[name] == value for name, value in only.items())]
    for name in ("model", "question"):
        if len(found := sorted({row[name] for row in rows})) > 1:
            raise UsageError(f"{folder} holds several: choose {name}={found[0]!r} or another of {', '.join(found)}")
    return rows


def _captioned(figure: go.Figure, title: str, setting: str) -> go.Figure:
    lines = textwrap.wrap(setting, CAPTION)
    text = "<br>".join([f"<b>{escape(title)}.</b>", *map(escape, lines)])
    figure.update_layout(template="plotly_white", title="", height=430 + 16 * len(lines), font_size=13)
    figure.update_layout(margin=dict(l=70, r=20, t=40, b=105 + 16 * len(lines)))
    where = dict(xref="paper", yref="paper", x=0, y=0, yshift=-62, xanchor="left", yanchor="top", align="left")
    figure.add_annotation(text=text, showarrow=False, font_size=12, **where)
    return figure
