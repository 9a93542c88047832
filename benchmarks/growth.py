"""Scaling of the decode time from 2K to 128K tokens: python -m benchmarks.growth [--out FILE]

Five systems on the 1B shape of benchmarks/shape.py. Each context is a separate run, with systems alternating within it.
The slope is the scaling exponent over the last three doublings: 1 means that twice the tokens take twice as long.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import torch

from benchmarks.micro import facts
from benchmarks.shape import ALPHA, measure
from benchmarks.stack import SHAPES, WARM, Field
from benchmarks.trace import record

CONTEXTS = (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
STEPS = 6
WAYS = {
    "full": ("full", {"drive": None}),
    "flexgen": ("flexgen", {"host_budget": 0}),
    "dualblade": ("dualblade", {"host_budget": 0}),
    "leoam": ("leoam", {"alpha": ALPHA}),
    "hillinfer": ("hillinfer", {"alpha": ALPHA}),
}


def grow(contexts: tuple[int, ...], shape: str, trace: Path, drive: Path, steps: int = STEPS) -> list[dict]:
    """One row per context and system."""
    rows, recorded = [], record(trace)
    for n in contexts:
        with torch.inference_mode(), tempfile.TemporaryDirectory(dir=drive) as folder:
            result = measure(Field(SHAPES[shape], recorded, n, WARM + steps), WAYS, Path(folder), steps, lambda _: None)
        for row in result["rows"]:
            rows.append({"system": row["system"], "tokens": n, **{k: row[k] for k in ("ms", "ms_low", "ms_high")}})
            print(f"{n:7} tokens, {row['system']:10} {row['ms']:8.1f} ms ({row['ms_low']:.1f} to {row['ms_high']:.1f})")
    return rows


def slopes(rows: list[dict]) -> dict[str, float]:
    """Scaling exponent of each system over its last four contexts."""
    frame = pd.DataFrame(rows).pivot(index="tokens", columns="system", values="ms").tail(4)
    return {name: float(np.polyfit(np.log(frame.index), np.log(frame[name]), 1)[0]) for name in frame}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(CONTEXTS))
    parser.add_argument("--shape", choices=list(SHAPES), default="1B")
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to benchmark")
    parser.add_argument("--trace", type=Path, default=Path("out/trace.npz"), help="recorded trace; created if missing")
    parser.add_argument(
        "--out", type=Path, default=Path("out/growth.json"), help="result as JSON; the plot is saved next to it"
    )
    words = parser.parse_args()
    words.out.parent.mkdir(parents=True, exist_ok=True)
    rows = grow(tuple(words.tokens), words.shape, words.trace, words.drive)
    found = slopes(rows)
    print(pd.DataFrame(rows).pivot(index="tokens", columns="system", values="ms").round(1).to_string())
    print("slopes: " + ", ".join(f"{name} {slope:.2f}" for name, slope in found.items()))
    figure = px.line(
        pd.DataFrame(rows), "tokens", "ms", color="system", markers=True, log_x=True, log_y=True,
        template="plotly_white", title=f"A decode step by context ({words.shape} shape, measured)",
    )  # fmt: skip
    figure.write_html(words.out.with_suffix(".html"))
    table = [{"system": name, "slope": slope} for name, slope in found.items()]
    about = facts(STEPS) | {"shape": f"{words.shape}, alpha {ALPHA}"}
    words.out.write_text(json.dumps({"facts": about, "rows": rows, "slopes": table}, indent=1), encoding="utf-8")
    print(f"plot: {words.out.with_suffix('.html')}")


if __name__ == "__main__":
    main()
