"""Write data/model/README.md from what data/evaluate.py and data/attention.py measured: `python data/card.py`.

Reads out/train/evaluation.jsonl, out/train/attention.json (either may be missing) and the last checkpoint's counters.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import hillinfer.longbench.synthetic as syn  # noqa: E402

BARS = {"lines": (0.95, 0.95, 0.9, 0.85), "needle": (0.95, 0.95, 0.9, 0.85), "passage": (None, 0.8)}
LENGTHS = ("1k", "2k", "4k", "8k")


def bar_of(row: dict) -> tuple[str, str]:
    """The bar set before training, and whether the row meets it."""
    task, _, length = row["name"].rpartition("_")
    if row["name"] == "LongEval":
        bar, value = 0.85, row["exact"]
    elif task == "two_hop" and length == "2k":
        bar, value = row["floor"] + 0.2, row["exact"]
    elif task == "chain" and length == "2k":
        bar, value = 0.9, row["tokens_right"]
    elif task == "majority":
        bar, value = row["floor"], row["low"]
    else:
        bars = BARS.get(task, ())
        bar = bars[LENGTHS.index(length)] if length in LENGTHS[: len(bars)] else None
        value = row["exact"]
    if bar is None:
        return "-", "-"
    kind = {"chain": " of tokens", "majority": " below the interval"}.get(task, "")
    return f"{bar:.2f}{kind}", "met" if value >= bar else "**missed**"


def table(rows: list[dict]) -> str:
    out = ["| task | n | exact match | 95 % interval | partial-key floor | tokens right | longest prompt | bar | |",
           "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        floor = "1.000 (no part is shared)" if row["floor"] is None else f"{row['floor']:.3f}"
        out.append(
            f"| {row['name']} | {row['n']} | {row['exact']:.3f} | {row['low']:.3f} - {row['high']:.3f} | {floor} | "
            f"{row['tokens_right']:.3f} | {row['longest']:,} | {' | '.join(bar_of(row))} |"
        )
    return "\n".join(out)


def attention_part(found: dict) -> str:
    tasks = list(dict.fromkeys(row[0] for row in found["accuracy"]))
    out = [f"| decode attends to | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    for policy, share in dict.fromkeys((row[1], row[2]) for row in found["accuracy"]):
        cells = [next(f"{r[3]:.3f}" for r in found["accuracy"] if r[:3] == [t, policy, share]) for t in tasks]
        out.append(f"| {policy} {share:.0%} | {' | '.join(cells)} |")
    heads = found["heads"]
    sinks = sum(h[3] >= 0.1 for h in heads)
    out += ["", f"Of {len(heads)} heads, {sinks} put 10 % or more of their mass on the first four tokens.", "",
            "| layer | keys for 95 % of the mass | on the first 4 | on the last 16 | top-10 % overlap, step to step |",
            "|---|---|---|---|---|"]  # fmt: skip
    for layer in sorted({h[0] for h in heads}):
        columns = list(zip(*(h[2:] for h in heads if h[0] == layer), strict=True))
        out.append(f"| {layer} | " + " | ".join(f"{min(c):.3f} to {max(c):.3f}" for c in columns) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=ROOT / "out" / "train", type=Path)
    parser.add_argument("--model", default=ROOT / "data" / "model", type=Path)
    args = parser.parse_args()
    state = torch.load(args.out / "last.pt", weights_only=True)
    lines = (args.out / "evaluation.jsonl").read_text().splitlines()
    rows = {row["name"]: row for row in map(json.loads, lines)}  # the last measurement of each counts
    order = {name: i for i, name in enumerate((*syn.TASKS, "LongEval"))}
    ordered = sorted(rows.values(), key=lambda r: (order[r["name"].rpartition("_")[0] or r["name"]], r["longest"]))
    attention = args.out / "attention.json"
    text = (ROOT / "data" / "card.md").read_text()
    fields = {
        "PARAMETERS": f"{sum(v.numel() for k, v in state['model'].items() if k != 'lm_head.weight') / 1e6:.1f}",
        "TOKENS": f"{state['tokens'] / 1e6:.1f}", "MINUTES": f"{state['seconds'] / 60:.0f}",
        "STEPS": str(state["step"]),
        "TABLE": table(ordered),
        "ATTENTION": attention_part(json.loads(attention.read_text())) if attention.exists() else "Not measured yet.",
    }  # fmt: skip
    for name, value in fields.items():
        text = text.replace("{" + name + "}", value)
    (args.model / "README.md").write_text(text)


if __name__ == "__main__":
    main()
