"""Plotly figures of a run: timeline, hits, attention and comparisons of systems."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hillinfer.timeline import LANES, Counters, Timeline
from hillinfer.workbench import palette
from hillinfer.workbench.observe import AttentionRecord

KINDS = list(palette.FAMILY)  # `draft` and `select` first: the spans inside them are drawn on top
LAYOUT = dict(template="plotly_white", margin=dict(l=60, r=20, t=50, b=50), height=360)
SHARES = dict(tickvals=[-3, -2, -1, 0], ticktext=["0.1 %", "1 %", "10 %", "100 %"])  # a bar of log10 shares
SHARES |= dict(title=dict(text="of the tokens", side="right"))
TICKS = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
LOG = dict(type="log", tickvals=TICKS, ticktext=[f"{tick:,.10g}" for tick in TICKS])  # whole numbers at each tick


def timeline_figure(timeline: Timeline, title: str = "Timeline", steps: int = 4) -> go.Figure:
    """Spans of the last `steps` steps, one row per lane. Drag to zoom, double-click to reset."""
    last = max((span.step for span in timeline.spans), default=0)
    spans = [span for span in timeline.spans if span.step > last - steps]
    origin = min((span.start_ns for span in spans), default=0)
    figure = go.Figure()
    for kind in sorted({span.kind for span in spans}, key=_order):
        group = [span for span in spans if span.kind == kind]
        figure.add_bar(
            name=kind,
            orientation="h",
            y=[span.lane for span in group],
            base=[(span.start_ns - origin) / 1e6 for span in group],
            x=[(span.end_ns - span.start_ns) / 1e6 for span in group],
            customdata=[(span.layer, span.step, span.bytes) for span in group],
            hovertemplate=f"{kind}<br>layer %{{customdata[0]}}, step %{{customdata[1]}}<br>%{{x:.3f}} ms"
            "<br>%{customdata[2]:,} bytes<extra></extra>",
            marker=dict(color=palette.colour(kind), line_width=0),
        )
    figure.update_layout(LAYOUT, title=title, barmode="overlay", xaxis_title=f"ms ({timeline.source})", dragmode="zoom")
    figure.update_yaxes(categoryorder="array", categoryarray=list(reversed(LANES)))
    return figure


def hits_figure(counters: Counters, title: str = "Attended tokens by tier", by: str = "layer") -> go.Figure:
    """Share of the attended tokens served by each tier: per layer over all steps, or per step with by="step"."""
    frame = counters.frame().groupby(by)[["queries", "device", "host", "drive", "demoted"]].sum()
    parts = (frame.device, frame.host, frame.drive - frame.demoted, frame.demoted)
    figure = go.Figure()
    for (name, colour), part in zip(palette.TIERS.items(), parts, strict=True):
        figure.add_bar(name=name, x=frame.index, y=part / frame.queries, marker_color=colour, marker_line_width=0)
    figure.update_layout(LAYOUT, title=title, barmode="stack", bargap=0.1, xaxis_title=by, legend_traceorder="normal")
    figure.update_yaxes(tickformat=".0%", title="share of the attended tokens", range=[0, 1])
    return figure


def sparsity_figure(record: AttentionRecord, title: str = "Attention sparsity") -> go.Figure:
    """Heat map, layers by heads: share of tokens that holds 90 % of the attention, mean over the recorded steps."""
    needed = record.needed()
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(needed),
            customdata=100 * needed,
            colorscale="Cividis",
            zmin=-3,
            zmax=0,
            hovertemplate="layer %{y}, head %{x}: %{customdata:.1f} % of the tokens<extra></extra>",
            colorbar=SHARES,
        )
    )
    figure.update_layout(LAYOUT, title=title, xaxis=dict(title="head", dtick=1), yaxis=dict(title="layer", dtick=1))
    figure.update_yaxes(autorange="reversed")
    return figure


def attention_figure(record: AttentionRecord, layer: int, head: int, step: int | None = None) -> go.Figure:
    """One head's attention over positions in one step, and the share of selected tokens in each block."""
    step, layers = record.snapshots_at(step)
    snapshot = layers[layer]
    positions = np.arange(len(snapshot.mass[head])) * snapshot.block
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.75, 0.25], vertical_spacing=0.06)
    mass, selected = snapshot.mass[head].astype(float), snapshot.chosen / snapshot.block
    figure.add_bar(x=positions, y=mass, marker_color=palette.COLOURS["choose"], row=1, col=1)
    figure.add_bar(x=positions, y=selected, marker_color=palette.COLOURS["link"], row=2, col=1)
    title = f"Layer {layer}, head {head}, step {step}: blocks of {snapshot.block} tokens"
    figure.update_layout(LAYOUT, title=title, bargap=0, showlegend=False)
    shares = {10.0**power: f"{10.0 ** (power + 2):g} %" for power in range(-4, 1)}
    marks = dict(tickvals=list(shares), ticktext=list(shares.values()))
    figure.update_yaxes(type="log", title="attention", range=[-4, 0], row=1, col=1, **marks)
    figure.update_yaxes(title="selected", tickformat=".0%", row=2, col=1)
    figure.update_xaxes(title="position, tokens", row=2, col=1)
    return figure


def systems_figure(names: list[str], accuracy: list[float], floor: float, title: str) -> go.Figure:
    """Accuracy of each system, with the expected accuracy of guessing from half of the key."""
    figure = go.Figure(
        go.Bar(x=names, y=accuracy, marker_color=palette.COLOURS["link"], text=[f"{a:.0%}" for a in accuracy])
    )
    figure.update_traces(textposition="outside", cliponaxis=False)
    note = dict(annotation_text=f"half of the key alone: {floor:.0%}", annotation_bgcolor="white")
    figure.add_hline(y=floor, line_dash="dot", annotation_position="top left", **note)
    figure.update_layout(LAYOUT, title=title, yaxis=dict(tickformat=".0%", range=[0, 1.1]))
    return figure


def tradeoff_figure(names: list[str], bytes_read: list[float], accuracy: list[float], title: str) -> go.Figure:
    """Accuracy against the KV read by attention per token; better is up and left.

    Systems on the same point share a label; labels of nearby points are stacked.
    """
    points: dict[tuple[float, float], list[str]] = {}
    for name, nbytes, right in zip(names, bytes_read, accuracy, strict=True):
        points.setdefault((round(nbytes / 2**20, 1), right), []).append(name)
    points = dict(sorted(points.items(), key=lambda item: (item[0][1], item[0][0])))
    most, labels, last, below = max(x for x, _ in points), [], None, 0
    for (x, y), systems in points.items():
        near = last is not None and abs(y - last[1]) < 0.1 and x - last[0] < 0.2 * most
        lines = [", ".join(systems[i : i + 3]) for i in range(0, len(systems), 3)]
        below, last = below if near else 0, (x, y)
        labels.append("<br>" * below + "<br>".join(lines))
        below += len(lines)
    figure = go.Figure(
        go.Scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            text=labels,
            mode="markers+text",
            textposition=["bottom left" if x > 0.85 * most else "bottom center" for x, _ in points],
            marker=dict(size=13, color=palette.COLOURS["drive read"]),
        )
    )
    figure.update_layout(LAYOUT, title=title, xaxis_title="KV read by attention, MiB per token")
    figure.update_xaxes(range=[-0.05 * most, 1.1 * most])
    figure.update_yaxes(
        title="correct answers", tickformat=".0%", range=[-0.25, 1.1], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    return figure


def _order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)
