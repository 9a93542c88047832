"""HTML report of an eval: accuracy by budget and by KV traffic, scores by task, fidelity by budget."""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from hillinfer.workbench import palette
from hillinfer.workbench.figures import LAYOUT, LOG
from hillinfer.workbench.report import write_report


def write_page(folder: Path, table, cost, close, summary: pd.DataFrame, facts: list[str]) -> Path:
    """Write `report.html` to the folder; scores, costs and fidelity come from longbench/report.py."""
    figures = []
    for (model, question), rows in table.groupby(["model", "question"]):
        name = f"{model}, question {question}"
        figures += [budget_figure(rows, f"{name}: accuracy by budget"), tasks_figure(rows, f"{name}: scores by task")]
        figures.append(bytes_figure(rows.merge(cost), f"{name}: accuracy by attended KV"))
    for (model, question, answer), rows in close.groupby(["model", "question", "answer"]) if len(close) else ():
        figures.append(fidelity_figure(rows, f"{model}, question {question}: divergence on the {answer} answers"))
    header, rows = list(summary.columns), [[str(cell) for cell in row] for row in summary.itertuples(index=False)]
    return write_report(folder / "report.html", "hillinfer eval", facts, header, rows, figures)


def budget_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """Average score against alpha, one line per system, with 95 % intervals. Full attention is a horizontal line."""
    rows, figure = table[table.task == "average"], go.Figure()
    for i, (system, points) in enumerate(rows.groupby("system")):
        points = points.sort_values("alpha")
        level = len(points) == 1 and points.alpha.iloc[0] == 1
        bars = dict(type="data", array=points.high - points.score, arrayminus=points.score - points.low, thickness=1)
        figure.add_scatter(
            name=system,
            x=[rows.alpha.min(), 1] if level else points.alpha,
            y=[*points.score] * (2 if level else 1),
            mode="lines" if level else "lines+markers",
            line=dict(dash="dot" if level else "solid", color=palette.line(i)[0]),
            marker_symbol=palette.line(i)[1],
            error_y=None if level else bars,
        )
    figure.update_layout(LAYOUT, title=title, yaxis_title="score (95 % interval)", height=460)
    ticks = sorted({*rows.alpha, 1.0})
    figure.update_xaxes(title="alpha: share of attended tokens", type="log", tickvals=ticks, ticktext=ticks)
    return figure


def bytes_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """Average score against the bytes of KV attended to per decode step."""
    rows, figure = table[table.task == "average"], go.Figure()
    for i, (system, points) in enumerate(rows.groupby("system")):
        points = points.sort_values("alpha")
        figure.add_scatter(
            name=system,
            x=points.KV_attended_KiB_per_token,
            y=points.score,
            mode="lines+markers",
            line_color=palette.line(i)[0],
            marker_symbol=palette.line(i)[1],
            customdata=points[["alpha", "ms_per_token", "drive_KiB_per_token"]],
            hovertemplate="alpha %{customdata[0]}<br>score %{y:.1f}<br>%{x:,.0f} KiB of KV, %{customdata[1]:.1f} ms "
            "and %{customdata[2]:,.0f} KiB from the drive per token",
        )
    figure.update_layout(LAYOUT, title=title, yaxis_title="score", height=460)
    figure.update_xaxes(title="attended KV, KiB per token (median)", **LOG)
    return figure


def fidelity_figure(close: pd.DataFrame, title: str) -> go.Figure:
    """KL from full attention against the share of tokens attended to, one line per system, with 95 % intervals."""
    figure = go.Figure()
    for i, (system, points) in enumerate(close[close.attended < 100].groupby("system")):
        points = points.sort_values("attended")
        figure.add_scatter(
            name=system,
            x=points.attended,
            y=points.kl,
            mode="lines+markers",
            line=dict(color=palette.line(i)[0], dash="dash" if system in ("oracle", "random") else "solid"),  # bounds
            marker_symbol=palette.line(i)[1],
            error_y=dict(
                type="data", array=points.kl_high - points.kl, arrayminus=points.kl - points.kl_low, thickness=1
            ),
            customdata=points[["alpha", "agree", "mass", "tokens"]],
            hovertemplate="alpha %{customdata[0]}<br>KL %{y:.3f} nats<br>agreement with full %{customdata[1]:.1f} %"
            "<br>attention mass kept %{customdata[2]:.1f} %<br>%{customdata[3]:,} answer tokens",
        )
    figure.update_layout(LAYOUT, title=title, height=460)
    figure.update_yaxes(title="KL to full, nats a token (95 % interval)", **LOG)
    figure.update_xaxes(title="tokens attended to, %", **LOG)
    return figure


def tasks_figure(table: pd.DataFrame, title: str) -> go.Figure:
    """Heat map of the scores, variants by tasks."""
    rows = table[table.bucket == ""]
    grid = rows.assign(variant=rows.system + rows.alpha.map(" {:g}".format))
    grid = grid.pivot_table(index="variant", columns="task", values="score", sort=False)
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            x=list(grid.columns),
            y=list(grid.index),
            colorscale="Cividis",
            zmin=0,
            zmax=100,
            texttemplate="%{z:.0f}",
            colorbar_title=dict(text="score", side="right"),
        )
    )
    figure.update_layout(LAYOUT, title=title, height=200 + 18 * len(grid), yaxis_autorange="reversed")
    return figure
