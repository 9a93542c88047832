"""Plots of the model's measurements: `python data/figures.py` writes out/model.html."""

import json
from pathlib import Path

import plotly.graph_objects as go

ROOT = Path(__file__).resolve().parents[1]
HEADS = ["keys that carry 95 % of the mass", "mass on the first 4 tokens", "mass on the last 16 tokens",
         "overlap of the top 10 %, step to step", "share of what the layer's heads write"]  # fmt: skip
LAYOUT = dict(template="plotly_white", height=380)


def figures(measured: dict) -> list[go.Figure]:
    answers, attention, curve = measured["answers"], measured["attention"], measured["curve"]
    by_task, depth, budget, training = go.Figure(), go.Figure(), go.Figure(), go.Figure()
    names = [row["name"] for row in answers]
    error = dict(array=[r["high"] - r["exact"] for r in answers], arrayminus=[r["exact"] - r["low"] for r in answers])
    by_task.add_bar(name="full cache", x=names, y=[row["exact"] for row in answers], error_y=error)
    by_task.add_bar(name="partial-key floor", x=names, y=[row["floor"] for row in answers])
    by_task.update_layout(LAYOUT, title="Exact match, 95 % intervals")
    for row in answers:
        if row["depths"]:
            depth.add_scatter(
                name=row["name"], x=[10, 30, 50, 70, 90], y=[a / n if n else None for a, n in row["depths"]]
            )
    depth.update_layout(LAYOUT, title="Exact match by depth of the asked fact", xaxis_title="% of the context")
    for task in dict.fromkeys(row[0] for row in attention["accuracy"]):
        top = [row for row in attention["accuracy"] if row[0] == task and row[1] in ("full", "top")]
        budget.add_scatter(name=task, x=[row[2] for row in top], y=[row[4] for row in top])
    budget.update_layout(
        LAYOUT, title="Exact match when decode attends to the true top", xaxis_title="share of the keys"
    )
    budget.update_xaxes(type="log", tickformat=".0%")
    for name in (name for name in curve[-1] if name not in ("step", "length", "loss", "text loss")):
        points = [row for row in curve if name in row]
        training.add_scatter(name=name, x=[row["step"] for row in points], y=[row[name] for row in points])
    training.update_layout(LAYOUT, title="Training: answer tokens right, running mean", xaxis_title="step")
    return [by_task, depth, budget, training, *heads(attention["heads"])]


def heads(rows: list[list[float]]) -> list[go.Figure]:
    """One heat map (layers by heads) per statistic."""
    out = []
    for i, title in enumerate(HEADS, 2):
        grid = [[row[i] for row in rows if row[0] == layer] for layer in sorted({row[0] for row in rows})]
        heat = go.Heatmap(z=grid, colorscale="Viridis", zmin=0, zmax=1, texttemplate="%{z:.2f}")
        out.append(go.Figure(heat).update_layout(LAYOUT, title=title, xaxis_title="head", yaxis_title="layer"))
    return out


def main() -> None:
    measured = json.loads((ROOT / "data" / "model" / "measured.json").read_text(encoding="utf-8"))
    parts = [f.to_html(full_html=False, include_plotlyjs=not i) for i, f in enumerate(figures(measured))]
    out = ROOT / "out" / "model.html"
    out.parent.mkdir(exist_ok=True)
    out.write_text(
        "<!doctype html><meta charset=utf-8><title>The embedded model</title>\n" + "\n".join(parts), encoding="utf-8"
    )
    print(f"open {out.relative_to(ROOT)} in a browser")


if __name__ == "__main__":
    main()
