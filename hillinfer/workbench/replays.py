"""Modelled results as a table, a figure and a page, labelled as such."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from hillinfer import files
from hillinfer.timeline import Timeline
from hillinfer.whatif.devices import find_profile
from hillinfer.whatif.sweep import Cell, timeline
from hillinfer.workbench import palette
from hillinfer.workbench.figures import LAYOUT, LOG
from hillinfer.workbench.report import format_rows, write_report

COLUMNS = ["profile", "model", "system", "context", "batch", "alpha", "host memory", "ms", "bound by", "note"]


def sweep_figure(frame: pd.DataFrame, x: str = "context", title: str = "") -> go.Figure:
    """Milliseconds per step against `x`, with colour and marker by system and dash by batch size.

    A menu selects profile, model and alpha.
    """
    figure, views = go.Figure(), []
    styles = {system: palette.line(i) for i, system in enumerate(frame.system.unique())}
    dashes = dict(zip(sorted(frame.batch.unique()), ("solid", "dash", "dot", "dashdot", "longdash") * 9, strict=False))
    for key, part in frame.groupby(["profile", "model", "alpha"], sort=False):
        before = len(figure.data)
        for (system, batch), line in part.groupby(["system", "batch"], sort=False):
            line = line.groupby(x, as_index=False).agg({"ms": "first", "note": "first"})
            figure.add_scatter(
                x=line[x], y=line.ms, name=f"{system}, batch {batch}", mode="lines+markers", text=line.note,
                visible=not views, line=dict(color=styles[system][0], dash=dashes[batch]),
                marker_symbol=styles[system][1],
                hovertemplate="%{fullData.name}<br>" + x + " %{x:,}<br>%{y:,.1f} ms<br>%{text}<extra></extra>",
            )  # fmt: skip
        views.append((f"{key[0]}, {key[1]}, alpha {key[2]:g}", before, len(figure.data)))
    total = len(figure.data)
    buttons = [
        dict(label=name, method="update", args=[{"visible": [first <= i < last for i in range(total)]}])
        for name, first, last in views
    ]
    figure.update_layout(LAYOUT, title=title or "A decode step, modelled", height=520, xaxis_title=x)
    figure.update_layout(updatemenus=[dict(buttons=buttons, x=1, y=1.15, xanchor="right")] if len(views) > 1 else [])
    ticks = sorted(frame[x].unique())
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    figure.update_yaxes(title="ms per step (modelled)", **LOG)
    return figure


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """A sweep with its host memory as text."""
    return frame.assign(host=["all" if host != host else f"{host / 1e9:.1f} GB" for host in frame.host.astype(float)])


def write_sweep(frame: pd.DataFrame, wanted: Sequence[Cell], run: Timeline | None, folder: Path) -> list[str]:
    """Write `replay.csv`, `report.html` and the timeline of the last cell; returns the facts and where the files are.

    wanted, run  the cells of the frame's rows and the recorded run that they replay
    """
    profiles = {name: find_profile(name) for name in frame.profile.unique()}
    facts = [f"{len(frame)} cells, all modelled; {int(frame.ms.isna().sum())} do not fit (reasons in the CSV)"]
    for name, profile in profiles.items():
        counts = ", ".join(f"{n} {how}" for how, n in profile.sources().items() if n)
        facts.append(f"{name}: {profile.about}; numbers {counts}")
    for last in [cell for cell, ms in zip(wanted, frame.ms, strict=True) if ms == ms][-1:]:
        trace = timeline(last, profiles[last.profile], run).save(folder / "timeline.json")
        facts.append(f"timeline of the last cell ({last.system}): {trace}")
    table = files.write_text(folder / "replay.csv", frame.to_csv(index=False))
    shown = named(frame).rename(columns={"host": "host memory", "bound": "bound by"})[COLUMNS]
    rows, figures = format_rows(shown, context="{:,}", ms="{:,.1f}"), [sweep_figure(frame)]
    page = write_report(folder / "report.html", "hillinfer replay (modelled)", facts, COLUMNS, rows, figures)
    return [*facts, f"table: {table}", f"plot: {page}"]
