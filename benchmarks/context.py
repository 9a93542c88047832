"""Claim check: does HillInfer's gain over streaming all KV grow with the context?

    python -m benchmarks.context --drive FOLDER

The embedded model answers the same questions with `flexgen` (reads all KV from the drive in each step) and `hillinfer`
(reads alpha of it), in alternation. `flexgen` also runs with as much KV memory as hillinfer's records, codes and
counters take. Measured on a real drive; the model is tiny, so the ratios do not transfer to other models.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import pandas as pd
import plotly.express as px
from transformers.utils import logging

from hillinfer.assets import load_embedded, machine
from hillinfer.longbench.runner import ask
from hillinfer.longbench.synthetic import make_records
from hillinfer.systems.registry import make_cache

SEED = 31


def measure(drive: Path, lengths: list[int], repeats: int, alpha: float) -> pd.DataFrame:
    """One row per length and system: median and quartiles of milliseconds per token, and bytes in memory."""
    model, tokenizer = load_embedded()
    rows = []
    for tokens in lengths:
        times: dict[str, list[float]] = {}
        held: dict[str, int] = {}
        for record in make_records("lines", tokens, repeats, SEED):
            for name in ("hillinfer", "flexgen", "flexgen, equal memory"):
                options = {"alpha": alpha, "drive": drive}
                if name.endswith("memory"):
                    options["host_budget"] = held["hillinfer"]
                with make_cache(model, name.split(",")[0], **options) as cache:
                    answer = ask(model, tokenizer, record, cache)
                times.setdefault(name, []).append(answer.ms_per_token)
                held[name] = answer.memory_bytes
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            gain = statistics.median(a / b for a, b in zip(values, times["hillinfer"], strict=True))
            rows.append({"tokens": tokens, "system": name, "ms per token": middle, "from": low, "to": high,
                         "times hillinfer's": gain, "KiB in memory": held[name] // 1024})  # fmt: skip
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drive", type=Path, help="folder on the drive; by default a temporary one")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("out/context.html"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.drive) as folder:
        frame = measure(Path(folder), args.lengths, args.repeats, args.alpha)
    print(frame.to_string(index=False, float_format="%.2f"))
    figure = px.line(
        frame, "tokens", "ms per token", color="system", markers=True, log_x=True, template="plotly_white",
        title="A decode step by context (measured, embedded model)",
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(args.out)
    print(f"measured on {machine()}; plot: {args.out}")


if __name__ == "__main__":
    main()
