"""Configurations of the drive's evaluation kernel (HillInfer's CEC), as a table and a figure."""

import pandas as pd
import plotly.graph_objects as go

from hillinfer.systems.hillinfer.cec import CLOCK, DEVICE, MEMORIES, configurations
from hillinfer.workbench.figures import LAYOUT
from hillinfer.workbench.palette import COLOURS


def cec_frame(clock: float = CLOCK) -> pd.DataFrame:
    """One row per configuration: simulated cycles, synthesised area, modelled rates at `clock` (Hz, assumed)."""
    return pd.DataFrame(
        [
            {
                "kernel": c.name,
                "cycles/token": round(c.cycles, 3),
                "over ideal": f"{c.overhead:.1%}",
                **{kind: f"{value:g} ({value / DEVICE[kind]:.1%})" for kind, value in c.area.items()},
                **{f"Mtoken/s, {name}": round(c.tokens_per_second(r, clock) / 1e6, 1) for name, r in MEMORIES.items()},
                **{f"recall at {share}": round(value, 3) for share, value in c.recall.items()},
            }
            for c in configurations()
        ]
    )


def pareto_figure(memory: str = "DDR4 measured", clock: float = CLOCK) -> go.Figure:
    """Rate against area, the largest share of any device resource, with a Pareto front for each precision."""
    figure = go.Figure()
    for bits, colour in ((8, COLOURS["link"]), (4, COLOURS["choose"])):
        kernels = sorted((c for c in configurations() if c.bits == bits), key=lambda c: c.share())
        rates = [c.tokens_per_second(MEMORIES[memory], clock) / 1e6 for c in kernels]
        best = [i for i, rate in enumerate(rates) if rate > max(rates[:i], default=0)]
        shares = [100 * c.share() for c in kernels]
        names = [f"{c.name}<br>recall {c.recall['0.1']:.3f}" for c in kernels]
        figure.add_scatter(x=shares, y=rates, mode="markers", name=f"INT{bits}", text=names, hoverinfo="text+x+y")
        figure.data[-1].marker = dict(color=colour, size=10)
        figure.add_scatter(
            x=[shares[i] for i in best],
            y=[rates[i] for i in best],
            mode="lines",
            name=f"INT{bits} Pareto front",
            line=dict(shape="hv", color=colour),
        )
    title = f"Evaluation kernel, keys from {memory}, {clock / 1e6:.0f} MHz assumed (modelled rates)"
    figure.update_layout(**LAYOUT, title=title)
    figure.update_xaxes(title="highest utilisation of any xcku15p resource, %")
    figure.update_yaxes(title="Mtoken/s per KV head")
    return figure
