"""Claim check: is a layer's step shortest near the predicted split between host and drive (HillInfer, APP)?

    python -m benchmarks.balance --drive FOLDER

One layer of Llama-3-8B's shape with random keys on the emulated drive, paced to a SmartSSD's rates. For each share of
tokens in the host's pool: score on both sides, select alpha of the tokens, fetch them. The prediction uses the speeds
measured in the same run. Keys are random, so hot tokens are selected no more often than cold ones.
--host-gbps 4 also paces the host's scoring, to emulate a weaker host that benefits from a split.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from hillinfer.assets import machine
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.evaluator.ranks import head_ranks
from hillinfer.evaluator.topk import topk
from hillinfer.systems.hillinfer.balance import SelectionRates
from hillinfer.systems.hillinfer.drive import EmulatedDrive
from hillinfer.systems.hillinfer.profile import THIS, Profile
from hillinfer.systems.hillinfer.protocol import Emulation, Shape
from hillinfer.systems.hillinfer.scoring import DriveLog, ScoringStore
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import LayerHits
from hillinfer.tiers.window import Window
from hillinfer.timeline import Counters, Timeline, Track
from hillinfer.whatif.measure import DIM, GROUP, HEADS, RECORD_BYTES, measure_scoring

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
REPEATS = 21


def paced(score: Callable, rate: float) -> Callable:
    """`score`, delayed to the speed of a host that scores `rate` bytes of codes per second."""

    def slower(hot: np.ndarray) -> np.ndarray:
        due = time.perf_counter() + len(hot) * HEADS * DIM / rate
        scores = score(hot)
        while (left := due - time.perf_counter()) > 0:
            time.sleep(left / 2 if left > 2e-4 else 0)
        return scores

    return slower


def step_ms(folder: Path, n: int, share: float, alpha: float, rate: float = math.inf) -> float:
    """Median milliseconds of one step (scoring, selection, transfers) with one share of the tokens in the pool."""
    torch.manual_seed(0)
    geometry = Geometry(1, HEADS, DIM, torch.bfloat16, torch.device("cpu"))
    drive = EmulatedDrive(folder, Shape(1, 1, geometry.record_bytes, HEADS, DIM), Emulation(paced=True))
    try:
        hits = LayerHits(1)
        track, logs, window = Track(Timeline(), Counters(), 0), [DriveLog(drive, geometry, 0)], Window(geometry, 4, 16)
        store = ScoringStore(geometry, track, logs, hits, window, 0.0, lambda n: int(share * n))
        codes = KeyCodes(1, HEADS, DIM)
        keys = torch.randn(1, n, HEADS, DIM, dtype=torch.bfloat16)
        doublings = codes.append(keys.transpose(1, 2))
        store.append(torch.stack((keys, keys), 2), (codes.newest(keys.shape[1]), doublings))
        drive.report()  # waits for the writes
        times = []
        for _ in range(REPEATS + 1):
            query, unit = codes.query(torch.randn(HEADS * GROUP, DIM), 0)
            start = time.perf_counter()
            score = paced(lambda hot, query=query: codes.scorer(query, 0)(hot), rate)
            scores = store.scores(0, query, score, codes.nbytes)
            best = topk(head_ranks(scores, np.repeat(unit * DIM**-0.5, GROUP)), int(alpha * n))
            store.fetch(0, np.sort(best))
            times.append((time.perf_counter() - start) * 1e3)
            store.missed.clear()  # nothing is promoted: the share stays
        return statistics.median(times[1:])
    finally:
        drive.close()


def measure_splits(folder: Path, n: int, alphas: list[float], rate: float = math.inf) -> tuple[pd.DataFrame, list[str]]:
    """One row per alpha and host share with measured and predicted time, and the measured speeds as text.

    The host scores at most `rate` bytes/s.
    """
    parts = measure_scoring(folder, paced=True)
    speeds = Profile(THIS, machine(), parts).speeds(RECORD_BYTES)
    facts = [
        f"{part}.{number}: {found.at() / 1e9:.2f} GB/s ({found.source})"
        for part, rates in parts.items()
        for number, found in rates.items()
    ]
    if rate < speeds.fc:
        speeds = replace(speeds, fc=rate)
        facts.append(f"fc: emulated, {rate / 1e9:g} GB/s: the host's scoring was paced to that")
    code, record, rows = HEADS * DIM, RECORD_BYTES, []
    for alpha in alphas:
        beta, rates = speeds.beta(alpha, code, record), SelectionRates(alpha, alpha)
        for share in sorted({*SHARES, round(best := speeds.host_share(rates, code, record), 2)}):
            row = {"tokens": n, "alpha": alpha, "host share": share, "ms": step_ms(folder, n, share, alpha, rate)}
            row["predicted ms"] = speeds.step_seconds(share, rates, code, record) * n * 1e3
            rows.append(row | {"predicted share": best, "paper's share": beta / (1 + beta)})
    return pd.DataFrame(rows), facts


def regret(rows: pd.DataFrame, share: float) -> float:
    """Relative excess of the step at this share over the shortest measured step, interpolated between shares."""
    return float(np.interp(share, rows["host share"], rows.ms) / rows.ms.min() - 1)


def plot(frame: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for alpha, rows in frame.groupby("alpha"):
        figure.add_scatter(x=rows["host share"], y=rows.ms, name=f"alpha {alpha}, measured")
        at = rows["predicted share"].iloc[0]
        at_ms = np.interp(at, rows["host share"], rows.ms)
        mark = dict(symbol="star", size=14, color="black")
        figure.add_scatter(x=[at], y=[at_ms], name=f"alpha {alpha}, predicted", mode="markers", marker=mark)
    return figure.update_layout(
        template="plotly_white", title="A layer's step by the host's share (emulated drive, paced)",
        xaxis_title="share of the tokens in the host's pool", yaxis_title="ms (measured)",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drive", type=Path, help="folder on the drive; by default a temporary one")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--host-gbps", type=float, default=math.inf, help="GB/s of codes that the host is paced to")
    parser.add_argument("--out", type=Path, default=Path("out/balance.html"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.drive) as folder:
        frame, facts = measure_splits(Path(folder), args.tokens, args.alphas, 1e9 * args.host_gbps)
    print(frame.to_string(index=False, float_format="%.2f"))
    for alpha, rows in frame.groupby("alpha"):
        for name in ("predicted share", "paper's share"):
            share = rows[name].iloc[0]
            print(f"alpha {alpha}: {name} {share:.2f} is {regret(rows, share):.0%} above the shortest measured step")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(frame).write_html(args.out)
    print("\n".join([*facts, f"measured on {machine()}; plot: {args.out}"]))


if __name__ == "__main__":
    main()
