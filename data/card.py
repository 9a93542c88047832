"""Write the model card, data/model/README.md and measured.json, from recorded measurements: `python data/card.py`.

Reads the output of `make show-model` in out/model/ (evaluation.jsonl, attention.json) and of data/train.py in
out/train/ (curve.jsonl, counters of the last checkpoint). --again names the output of data/evaluate.py --json for a
retrained model.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import hillinfer.longbench.synthetic as syn  # noqa: E402

BARS = {"lines": (0.95, 0.95, 0.9, 0.85), "needle": (0.95, 0.95, 0.9, 0.85), "passage": (None, 0.8)}
LENGTHS = ("1k", "2k", "4k", "8k")
VOTES = ("majority", "tally")


def bar_of(row: dict) -> tuple[str, bool | None]:
    """The threshold set before training, as text, and True if the row meets it; None if there is no threshold."""
    task, _, length = row["name"].rpartition("_")
    if row["name"] == "LongEval":
        return "0.85", row["exact"] >= 0.85
    if task == "two_hop" and length == "2k":
        return "0.20 above the floor", row["exact"] >= row["floor"] + 0.2
    if task == "chain" and length == "2k":
        return "0.90 of tokens", row["tokens_right"] >= 0.9
    if task in VOTES:
        return "interval above the floor", row["low"] > row["floor"]
    bars = BARS.get(task, ())
    bar = bars[LENGTHS.index(length)] if length in LENGTHS[: len(bars)] else None
    if bar is None:
        return "-", None
    far = task == "passage" or row["floor"] <= row["exact"] - 0.4
    return f"{bar:.2f}" + ("" if task == "passage" else ", floor 0.40 below"), row["exact"] >= bar and far


def table(head: str, rows: list[list[str]]) -> str:
    out = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join(out + [f"| {' | '.join(row)} |" for row in rows])


def answers_part(rows: list[dict], again: dict[str, dict]) -> str:
    cells = []
    for row in rows:
        floor = "1.000 (no part is shared)" if row["floor"] is None else f"{row['floor']:.3f}"
        bar, met = bar_of(row)
        verdict = "-" if met is None else "met" if met else "**missed**"
        cells.append([row["name"], str(row["n"]), f"{row['exact']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", floor,
                      f"{row['tokens_right']:.3f}", f"{row['longest']:,}", bar, verdict])  # fmt: skip
        if other := again.get(row["name"]):
            cells[-1].append(f"{other['exact']:.3f} ({other['low']:.3f} - {other['high']:.3f})")
    head = "task | n | exact match | 95 % interval | partial-key floor | tokens right | longest prompt | bar | "
    return table(head + " | trained again" * bool(again), cells)


def depths_part(rows: list[dict]) -> str:
    head = "fact at | 0 - 20 % | 20 - 40 % | 40 - 60 % | 60 - 80 % | 80 - 100 % of the context"
    return table(
        head,
        [[row["name"], *(f"{a / max(1, n):.3f} ({n})" for a, n in row["depths"])] for row in rows if row["depths"]],
    )


def restricted_part(found: dict) -> str:
    tasks = list(dict.fromkeys(row[0] for row in found["accuracy"]))
    score = {(task, policy, share): value for task, policy, share, _, value in found["accuracy"]}
    ways = dict.fromkeys((row[1], row[2]) for row in found["accuracy"])
    asked = {row[0]: str(row[3]) for row in found["accuracy"]}
    rows = [["questions", *(asked[task] for task in tasks)]]
    rows += [[f"{way[0]} {way[1]:.0%}", *(f"{score[task, *way]:.3f}" for task in tasks)] for way in ways]
    return table("decode attends to | " + " | ".join(tasks), rows)


def first_part(found: dict) -> str:
    rows = []
    for row in found["first tokens"]:
        (a, b), (c, d), (mean, low, high) = row["exact"], row["loss"], row["difference"]
        rows.append([row["task"], str(row["n"]), f"{a:.3f}", f"{b:.3f}", f"{c:.3f}", f"{d:.3f}",
                     f"{mean:.3f} [{low:.3f}, {high:.3f}]"])  # fmt: skip
    return table("task | n | exact match without | with | loss without | with | difference of the losses", rows)


def heads_part(found: dict) -> str:
    rows = []
    for layer in sorted({h[0] for h in found["heads"]}):
        columns = zip(*(h[2:] for h in found["heads"] if h[0] == layer), strict=True)
        rows.append([str(layer), *(" ".join(f"{v:.2f}".removeprefix("0") for v in column) for column in columns)])
    head = "layer | keys for 95 % of the mass | mass on the first 4 | on the last 16 | top-10 % overlap, step to step"
    sinks = sum(h[3] >= 0.1 for h in found["heads"])
    least = min(h[6] for h in found["heads"])
    note = (
        f"Of {len(found['heads'])} heads, {sinks} put 10 % or more of their mass on the first four tokens. No head is "
    )
    note += f"dead: the one that writes least writes {least:.1%} of what its layer's heads write."
    return note + "\n\n" + table(head + " | share of the writing", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=ROOT / "out" / "train", type=Path)
    parser.add_argument("--measured", default=ROOT / "out" / "model", type=Path)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--model", default=ROOT / "data" / "model", type=Path)
    args = parser.parse_args()

    def lines(path: Path) -> list[dict]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    state = torch.load(args.out / "last.pt", weights_only=True)
    rows = {
        row["name"]: row for row in lines(args.measured / "evaluation.jsonl")
    }  # the latest measurement of each counts
    order = {name: i for i, name in enumerate((*syn.TASKS, "LongEval"))}
    answers = sorted(rows.values(), key=lambda r: (order[r["name"].rpartition("_")[0] or r["name"]], r["longest"]))
    again = {row["name"]: row for row in lines(args.again)} if args.again else {}
    attention = json.loads((args.measured / "attention.json").read_text(encoding="utf-8"))
    curve = list({row["step"]: row for row in lines(args.out / "curve.jsonl")}.values())
    fields = {
        "PARAMETERS": f"{sum(v.numel() for k, v in state['model'].items() if k != 'lm_head.weight') / 1e6:.1f}",
        "TOKENS": f"{state['tokens'] / 1e6:.1f}", "MINUTES": f"{state['seconds'] / 60:.0f}",
        "STEPS": str(state["step"]), "TABLE": answers_part(answers, again), "DEPTHS": depths_part(answers),
        "RESTRICTED": restricted_part(attention), "FIRST": first_part(attention), "HEADS": heads_part(attention),
    }  # fmt: skip
    text = (ROOT / "data" / "card.md").read_text(encoding="utf-8")
    for name, value in fields.items():
        text = text.replace("{" + name + "}", value)
    (args.model / "README.md").write_text(text, encoding="utf-8")
    measured = {"answers": answers, "attention": attention, "curve": curve, "trained again": [*again.values()]}
    rounded = json.loads(json.dumps(measured), parse_float=lambda x: round(float(x), 4))
    (args.model / "measured.json").write_text(json.dumps(rounded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
