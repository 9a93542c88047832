"""Figures of modelled results, labelled as such on their axes."""

import pandas as pd
import plotly.graph_objects as go

from hillinfer.workbench import palette
from hillinfer.workbench.figures import LAYOUT


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
    figure.update_xaxes(type="log", tickvals=sorted(frame[x].unique()))
    figure.update_yaxes(type="log", title="ms per step (modelled)")
    return figure
