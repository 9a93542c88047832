"""Configurations of the drive's evaluation kernel (HillInfer's CEC), as a table and a figure."""

import json

import pandas as pd
import plotly.graph_objects as go

from hillinfer.systems.hillinfer.cec import CLOCK, TABLE, Configuration, configurations
from hillinfer.workbench.figures import LAYOUT
from hillinfer.workbench.palette import COLOURS

# Bytes/s. DDR: 15.4e9 as measured on the card, 19.2e9 as the peak of 64-bit DDR4-2400; NAND: the card's own flash.
MEMORIES = {"DDR4 peak": 19.2e9, "DDR4 measured": 15.4e9, "NAND": 3.2e9, "NAND, one stream": 2.4e9}
# Totals of the xcku15p, including the share that the platform's shell uses.
DEVICE = {"LUT": 522_720, "FF": 1_045_440, "DSP": 1_968, "BRAM36": 984, "URAM": 128}


def tools() -> dict[str, str]:
    """Provenance of the table: tool versions, and the digest of the kernel's source."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["tools"]


def token_bytes(kernel: Configuration) -> int:
    """Bytes of one token's codes of one KV head."""
    return kernel.head_dim * kernel.bits // 8


def overhead(kernel: Configuration) -> float:
    """Relative cycles above the minimum of the memory port."""
    return kernel.cycles * kernel.lanes / token_bytes(kernel) - 1


def tokens_per_second(kernel: Configuration, memory: float, clock: float = CLOCK) -> float:
    """Tokens of one KV head per second, limited by the clock (Hz) or by the memory of the keys (bytes/s)."""
    return min(clock / kernel.cycles, memory / token_bytes(kernel))


def utilisation(kernel: Configuration) -> float:
    """Share of the device: the largest over all kinds of resource."""
    return max(kernel.area[kind] / total for kind, total in DEVICE.items())


def cec_frame(clock: float = CLOCK) -> pd.DataFrame:
    """One row per configuration: simulated cycles, synthesised area, modelled rates at `clock` (Hz, assumed)."""
    return pd.DataFrame(
        [
            {
                "kernel": c.name,
                "cycles/token": round(c.cycles, 3),
                "over ideal": f"{overhead(c):.1%}",
                **{kind: f"{value:g} ({value / DEVICE[kind]:.1%})" for kind, value in c.area.items()},
                **{f"Mtoken/s, {name}": round(tokens_per_second(c, r, clock) / 1e6, 1) for name, r in MEMORIES.items()},
                **{f"recall at {share}": round(value, 3) for share, value in c.recall.items()},
            }
            for c in configurations()
        ]
    )


def pareto_figure(memory: str = "DDR4 measured", clock: float = CLOCK) -> go.Figure:
    """Rate against device utilisation, with the Pareto front of each precision."""
    figure = go.Figure()
    for bits, colour in ((8, COLOURS["link"]), (4, COLOURS["choose"])):
        kernels = sorted((c for c in configurations() if c.bits == bits), key=utilisation)
        rates = [tokens_per_second(c, MEMORIES[memory], clock) / 1e6 for c in kernels]
        best = [i for i, rate in enumerate(rates) if rate > max(rates[:i], default=0)]
        shares = [100 * utilisation(c) for c in kernels]
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
