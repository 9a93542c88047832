"""Claim check: is a layer's step fastest near the split that HillInfer's closed form predicts?

    python -m benchmarks.balance --drive FOLDER

One layer of a Llama-3-8B's shape with random keys on the emulated drive, paced to a SmartSSD's rates. For each share of
tokens in the host's pool: score on both sides, choose alpha of the tokens, bring them. Measured; the prediction is
from `hillinfer profile` in the same run. Keys are random, so hot tokens are chosen no more often than cold ones.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch

from hillinfer.demo import machine
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.evaluator.topk import merge_heads
from hillinfer.profile import DIM, GROUP, HEADS, measure
from hillinfer.tiers.computational import Shape
from hillinfer.tiers.emulated import EmulatedDrive, Emulation
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import LayerHits
from hillinfer.tiers.scoring_store import RemoteStream, ScoringStore
from hillinfer.tiers.window import Window

SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
REPEATS = 7


def step_ms(folder: Path, n: int, share: float, alpha: float) -> float:
    """Median milliseconds of one step's scoring, choice and transfers, at one share of tokens in the pool."""
    torch.manual_seed(0)
    geometry = Geometry(1, HEADS, DIM, torch.bfloat16, torch.device("cpu"))
    drive = EmulatedDrive(folder, Shape(1, 1, geometry.record_bytes, HEADS, DIM), Emulation(paced=True))
    try:
        hits = LayerHits(1)
        store = ScoringStore(
            geometry, [RemoteStream(drive, geometry, 0)], hits, Window(geometry, 4, 16), 0.0, lambda n: int(share * n)
        )
        codes = KeyCodes(1, HEADS, DIM)
        keys = torch.randn(1, n, HEADS, DIM, dtype=torch.bfloat16)
        doublings = codes.append(keys.transpose(1, 2))
        store.append(torch.stack((keys, keys), 2), (codes.newest(keys.shape[1]), doublings))
        drive.report()  # waits for the writes
        times = []
        for _ in range(REPEATS + 1):
            query = codes.query(torch.randn(HEADS * GROUP, DIM), 0)
            start = time.perf_counter()
            scores, _ = store.scores(0, query, lambda hot, query=query: codes.scores(query, 0, hot))
            store.fetch(0, merge_heads(scores, int(alpha * n)), promote=False)
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times[1:])
    finally:
        drive.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drive", type=Path, help="folder on the drive; by default a temporary one")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--out", type=Path, default=Path("out/balance.html"))
    args = parser.parse_args()
    figure = go.Figure()
    with tempfile.TemporaryDirectory(dir=args.drive) as folder:
        speeds, facts = measure(Path(folder), paced=True)
        predicted = speeds.host_share(args.alpha, HEADS * DIM, 4 * HEADS * DIM)
        for n in args.tokens:
            rows = [{"tokens": n, "host share": s, "ms": step_ms(Path(folder), n, s, args.alpha)} for s in SHARES]
            frame = pd.DataFrame(rows)
            best = frame.loc[frame.ms.idxmin()]
            print(frame.to_string(index=False, float_format="%.2f"))
            print(f"{n} tokens: fastest at a host share of {best['host share']:.2f}, predicted {predicted:.2f}")
            figure.add_scatter(x=frame["host share"], y=frame.ms, name=f"{n} tokens, measured")
    figure.add_vline(x=predicted, line_dash="dot", annotation_text="predicted")
    figure.update_layout(
        template="plotly_white", title="A layer's step by the host's share (emulated drive, paced)",
        xaxis_title="share of the tokens in the host's pool", yaxis_title="ms (measured)",
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(args.out)
    print("\n".join([*facts, f"measured on {machine()}, alpha {args.alpha}; plot: {args.out}"]))


if __name__ == "__main__":
    main()
