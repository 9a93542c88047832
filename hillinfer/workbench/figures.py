"""Figures of a run, as plotly objects."""

import plotly.graph_objects as go
from plotly.colors import qualitative

from hillinfer.pipeline.timeline import LANES, TIERS, Counters, Timeline

# A kind has one colour in all figures. `select` comes first, so that the scores within it are drawn over it.
KINDS = "select guess score merge encode append view gather swap attend dense wait".split()
KINDS += "read prefetch evaluate write transfer".split()
LAYOUT = dict(template="plotly_white", margin=dict(l=60, r=20, t=50, b=50), height=360)
TIER_COLOURS = {"device": "#4c78a8", "host": "#54a24b", "drive": "#e45756"}


def timeline_figure(timeline: Timeline, title: str = "Timeline", steps: int = 4) -> go.Figure:
    """Spans of the last `steps` steps, a row for each lane; drag to zoom, double-click to go back."""
    last = max((span.step for span in timeline.spans), default=0)
    spans = [span for span in timeline.spans if span.step > last - steps]
    origin = min((span.start_ns for span in spans), default=0)
    figure = go.Figure()
    for kind in sorted({span.kind for span in spans}, key=_order):
        own = [span for span in spans if span.kind == kind]
        figure.add_bar(
            name=kind,
            orientation="h",
            y=[span.lane for span in own],
            base=[(span.start_ns - origin) / 1e6 for span in own],
            x=[(span.end_ns - span.start_ns) / 1e6 for span in own],
            customdata=[(span.layer, span.step, span.bytes) for span in own],
            hovertemplate=f"{kind}<br>layer %{{customdata[0]}}, step %{{customdata[1]}}<br>%{{x:.3f}} ms"
            "<br>%{customdata[2]:,} bytes<extra></extra>",
            marker=dict(color=qualitative.Dark24[_order(kind) % 24], line_width=0),
        )
    figure.update_layout(LAYOUT, title=title, barmode="overlay", xaxis_title=f"ms ({timeline.source})", dragmode="zoom")
    figure.update_yaxes(categoryorder="array", categoryarray=list(reversed(LANES)))
    return figure


def hits_figure(counters: Counters, title: str = "Who served the attended tokens") -> go.Figure:
    """Share of each layer's attended tokens by the tier that held them, over all steps."""
    frame = counters.frame().groupby("layer")[["queries", *TIERS]].sum()
    figure = go.Figure()
    for tier in TIERS:
        figure.add_bar(name=tier, x=frame.index, y=frame[tier] / frame.queries, marker_color=TIER_COLOURS[tier])
    figure.update_layout(LAYOUT, title=title, barmode="stack", xaxis_title="layer", yaxis_tickformat=".0%")
    return figure


def systems_figure(names: list[str], accuracy: list[float], floor: float, title: str) -> go.Figure:
    """Accuracy of each system, with what half of the key alone would get."""
    figure = go.Figure(go.Bar(x=names, y=accuracy, marker_color="#4c78a8", text=[f"{a:.0%}" for a in accuracy]))
    figure.add_hline(
        y=floor, line_dash="dot", annotation_text=f"half of the key alone: {floor:.0%}", annotation_position="top left"
    )
    figure.update_layout(LAYOUT, title=title, yaxis=dict(tickformat=".0%", range=[0, 1.05]))
    return figure


def _order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)
