"""Tables of fidelity: per system and alpha over all samples, and the paired difference to one of them."""

import numpy as np
import pandas as pd

from hillinfer.longbench.statistics import interval, paired

BY = ["model", "question", "answer", "system", "alpha"]


def fidelity(frame: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """A row for each model, question, forced answer, system and alpha; empty if nothing was measured.

    frame     as from `report.frame_of`
    baseline  the system to compare with at each alpha; None takes hillinfer, topk, or the first that selects

    kl (nats), agree (%), nll (nats) and their 95 % bootstrap intervals are means over samples; kl_p95 is over answer
    tokens; mass and attended are in %. to_baseline is the paired difference in kl, with its interval and p.
    """
    samples = _samples(frame)
    if samples.empty:
        return samples
    selecting = samples[samples.attended < 1].system
    names = [baseline or "hillinfer", "topk", *selecting]
    baseline = next((name for name in names if name in set(samples.system)), names[0])
    base = samples[samples.system == baseline].set_index([*BY[:3], "alpha", "task", "id"]).kl_mean
    rows = []
    for key, part in samples.groupby(BY, sort=False):
        row = dict(zip(BY, key, strict=True), samples=len(part), tokens=int(part.kl.map(len).sum()))
        for name, scale in (("kl", 1), ("agree", 100), ("nll", 1)):
            means = scale * part[name].map(np.mean).to_numpy()
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval([means]), strict=True))
        row["kl_p95"] = float(np.percentile(np.concatenate(part.kl.tolist()), 95))
        row |= {name: 100 * part[name].mean() for name in ("mass", "attended")}
        same = base.reindex(pd.MultiIndex.from_frame(part[[*BY[:3], "alpha", "task", "id"]])).to_numpy()
        known = ~np.isnan(same)
        compared = paired([(part.kl_mean.to_numpy() - same)[known]]) if known.any() else (np.nan,) * 4
        row |= dict(zip(("to_baseline", "diff_low", "diff_high", "p"), compared, strict=True), baseline=baseline)
        rows.append(row)
    return pd.DataFrame(rows).round(6)


def _samples(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per result and forced answer."""
    if "fidelity" not in frame:
        return pd.DataFrame()
    found = [
        row | {"answer": answer} | values
        for row, fidelities in zip(
            frame[[*BY[:2], *BY[3:], "task", "id"]].to_dict("records"), frame.fidelity, strict=True
        )
        for answer, values in fidelities.items()
    ]
    table = pd.DataFrame(found)
    return table.assign(kl_mean=table.kl.map(np.mean)) if found else table


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text, for reports and terminals."""
    if table.empty:
        return table
    out = table[[*BY, "samples", "tokens"]].copy()
    out["KL to full"] = [f"{r.kl:.4f} [{r.kl_low:.4f}, {r.kl_high:.4f}]" for r in table.itertuples()]
    out["p95"] = table.kl_p95.map("{:.3f}".format)
    out["agree %"] = [f"{r.agree:.1f} [{r.agree_low:.1f}, {r.agree_high:.1f}]" for r in table.itertuples()]
    out["NLL change"] = table.nll.map("{:+.4f}".format)
    out["mass %"] = table.mass.map("{:.1f}".format)
    out["attended %"] = table.attended.map("{:.1f}".format)
    out[f"KL to {table.baseline.iloc[0]}'s"] = [
        "" if np.isnan(r.to_baseline) else f"{r.to_baseline:+.4f} [{r.diff_low:+.4f}, {r.diff_high:+.4f}]"
        for r in table.itertuples()
    ]
    return out
