"""Tables of an eval: scores with confidence intervals, the difference to `full`, and measured costs.

`scores` depends on the answers alone, so it is bit-identical however the run was split. `costs` holds measurements.
Scores are in per cent.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from hillinfer import files
from hillinfer.errors import UsageError
from hillinfer.longbench.fidelity_table import fidelity, shown
from hillinfer.longbench.reference import warnings_of
from hillinfer.longbench.results import read, read_manifest
from hillinfer.longbench.statistics import interval, paired
from hillinfer.longbench.tasks import find_task

VARIANT = ["model", "question", "system", "alpha"]
COSTS = ("_ms", "_per_token", "_bytes")
AVERAGE, CATEGORIES = "average", "average of categories"
INTRO = (
    "Scores are in per cent with 95 % bootstrap intervals over samples; the average is the mean over tasks. The "
    "difference to full is paired by sample; p is from a sign-flip permutation test, uncorrected for multiple tests."
)

FIDELITY = (
    "Fidelity is teacher-forced: KL(full, system) in nats, agreement on the most likely token, change of the answer's "
    "negative log-likelihood, attention mass kept; means over samples with 95 % bootstrap intervals, p95 over tokens."
)


def frame_of(rows: list[dict]) -> pd.DataFrame:
    """One row per result, sorted. `alpha` is 1 for systems with full attention."""
    if not rows:
        raise UsageError("there are no results yet: run `hillinfer eval` first")
    frame = pd.DataFrame(rows)
    frame["alpha"] = frame["alpha"].astype(float).fillna(1.0)
    numbers = frame.columns.intersection(["score", "attended", "cached", *(n for n in frame if n.endswith(COSTS))])
    frame[numbers] = frame[numbers].astype(float)  # None, without an answer or a time of its own, becomes NaN
    return frame.sort_values([*VARIANT, "task", "id"], ignore_index=True)


def scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Long-form table: model, question, system, alpha, task, bucket, n, score, low, high, diff, diff_low, diff_high, p.

    Each task is followed by its buckets, if any; the averages come last. `diff` is the difference to `full` over the
    same samples, NaN if `full` has not answered all of them.
    """
    out = []
    for (model, question), asked in frame.groupby(["model", "question"]):
        full = asked[asked.system == "full"].set_index(["task", "id"]).score
        for (system, alpha), part in asked.groupby(["system", "alpha"]):
            base = full.reindex(pd.MultiIndex.from_frame(part[["task", "id"]])).to_numpy()
            part = part.assign(diff=part.score.to_numpy() - base)
            for task, bucket, groups, weights in _cuts(part):
                row = dict(zip(VARIANT, (model, question, system, alpha), strict=True), task=task, bucket=bucket)
                out.append(row | _measures(groups, weights))
    return pd.DataFrame(out).dropna(subset="score", ignore_index=True)


def _cuts(part: pd.DataFrame):
    """Yield (task, bucket, groups, weights) of one variant: by task, by bucket, and for the averages."""
    tasks = dict(iter(part.groupby("task")))
    for name, group in tasks.items():
        yield name, "", [group], None
        for bucket in sorted({b for buckets in group.buckets for b in buckets}):
            yield name, bucket, [group[group.buckets.map(lambda buckets, b=bucket: b in buckets)]], None
    yield AVERAGE, "", list(tasks.values()), None
    kinds = [find_task(name).category for name, group in tasks.items() if group.suite.iloc[0] == "longbench"]
    if len(set(kinds)) == 6 and len(kinds) == len(tasks):  # LongBench's official average over its six categories
        yield CATEGORIES, "", list(tasks.values()), [1 / 6 / kinds.count(kind) for kind in kinds]


def _measures(groups: list[pd.DataFrame], weights: list[float] | None) -> dict:
    diffs = [100 * group["diff"].to_numpy() for group in groups]
    compared = (np.nan,) * 4 if any(np.isnan(d).any() for d in diffs) else paired(diffs, weights)
    values = (*interval([100 * group.score.to_numpy() for group in groups], weights), *compared)
    names = ("score", "low", "high", "diff", "diff_low", "diff_high", "p")
    rounded = (round(float(value), 4) for value in values)
    return {"n": sum(map(len, groups))} | dict(zip(names, rounded, strict=True))


def costs(frame: pd.DataFrame) -> pd.DataFrame:
    """Measured costs per variant: medians over samples, peak memory, and the share of tokens attended to."""
    grouped = frame.groupby(VARIANT)
    table = grouped.agg(
        samples=("score", "size"),
        ms_per_token=("ms_per_token", "median"),
        drive_KiB_per_token=("drive_bytes_per_token", lambda v: v.median() / 1024),
        KV_attended_KiB_per_token=("kv_bytes_per_token", lambda v: v.median() / 1024),
        memory_KiB=("memory_bytes", lambda v: v.max() / 1024),
        prompt_tokens=("prompt_tokens", "median"),
        truncated=("truncated", "sum"),
    )
    table["attended_%"] = 100 * grouped.attended.sum() / grouped.cached.sum()
    return table.round(2).reset_index()


def prefill_saving(frame: pd.DataFrame) -> str:
    """Measured time of the shared prefills, and the estimated time of one prefill per answer."""
    shared = frame[frame.shared & frame.paid_ms.notna()]
    if shared.empty:
        return "no prefill was shared"
    paid, copied, each = (shared[name].sum() / 1e3 for name in ("paid_ms", "fill_ms", "prefill_ms"))
    return (
        f"{len(shared)} answers shared {(shared.paid_ms > 0).sum()} prefills; measured: {paid + copied:.0f} s "
        f"({copied:.0f} s for copies), estimated with one prefill per answer: {each:.0f} s, "
        f"{each / (paid + copied):.1f} times as long"
    )


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """Wide table for reading: one row per variant, one column per task."""
    tasks = [name for name in dict.fromkeys(table.task) if name not in (AVERAGE, CATEGORIES)]
    whole = table[table.bucket == ""]
    pivot = whole.pivot_table(index=VARIANT, columns="task", values="score", sort=False)
    return pivot[[*tasks, *[n for n in (AVERAGE, CATEGORIES) if n in pivot]]].round(2).reset_index()


def summary(table: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """Average scores with intervals, and their costs, formatted as text."""
    rows = table[table.task == AVERAGE].merge(cost, on=VARIANT, how="left")
    out = rows[VARIANT].copy()
    out["n"] = rows.n
    out["score"] = [
        f"{r.score:.1f}" + ("" if np.isnan(r.low) else f" [{r.low:.1f}, {r.high:.1f}]") for r in rows.itertuples()
    ]
    out["to full"] = [_to_full(row) for row in rows.itertuples()]
    for name in ("attended_%", "ms_per_token", "drive_KiB_per_token", "KV_attended_KiB_per_token", "memory_KiB"):
        out[name.replace("_", " ")] = ["" if np.isnan(value) else f"{value:,.1f}" for value in rows[name]]
    return out


def _to_full(row) -> str:
    if np.isnan(row.p) or row.system == "full":
        return ""
    bounds = "" if np.isnan(row.diff_low) else f" [{row.diff_low:+.1f}, {row.diff_high:+.1f}]"
    return f"{row.diff:+.1f}{bounds} p={row.p:.3f}"


def markdown(frame: pd.DataFrame) -> str:
    """A GitHub-flavoured table. `DataFrame.to_markdown` would need another package."""
    header = [str(name) for name in frame.columns]
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells])


def _cell(value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def write(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, list[str]]:
    """Write scores.csv, costs.csv, fidelity.csv and report.md for a results folder.

    Returns scores, costs, fidelity, and the report's notes.
    """
    manifest, frame = read_manifest(folder), frame_of(read(folder))
    table, cost, close = scores(frame), costs(frame), fidelity(frame)
    last = manifest["runs"][-1]
    facts = [
        INTRO,
        f"Costs are measured on {last['hardware']}; times are medians, absent where systems shared a decode.",
        f"Settings: {', '.join(f'{k} {v}' for k, v in manifest['settings'].items())}.",
        f"Total: {len(frame)} answers took {frame.seconds.sum() / 60:.1f} minutes, summed over processes.",
        f"Prefill: {prefill_saving(frame)}.",
        *(f"Source: {source}" for source in manifest["sources"]),
        *warnings_of(frame, table, manifest),
    ]
    files.write_text(folder / "scores.csv", table.to_csv(index=False))
    files.write_text(folder / "costs.csv", cost.to_csv(index=False))
    if not close.empty:
        files.write_text(folder / "fidelity.csv", close.to_csv(index=False))
        facts.append(FIDELITY)
    tables = [part for part in (summary(table, cost), shown(close), wide(table)) if not part.empty]
    if (buckets := table[table.bucket != ""]).size:
        tables.append(buckets[[*VARIANT, "task", "bucket", "n", "score", "low", "high"]])
    text = ["# hillinfer eval", *facts, *map(markdown, tables)]
    files.write_text(folder / "report.md", "\n\n".join(text) + "\n")
    return table, cost, close, facts


def compare(one: Path, other: Path) -> tuple[pd.DataFrame, list[str]]:
    """Compare two results folders over their common samples, tasks and variants: scores and paired difference."""
    parts, facts = [], []
    settings = [read_manifest(folder)["settings"] for folder in (one, other)]
    for name in settings[0] | settings[1]:
        if settings[0].get(name) != settings[1].get(name):
            facts.append(f"{name} differs: {settings[0].get(name)} and {settings[1].get(name)}")
    for folder in (one, other):
        parts.append(frame_of(read(folder)))
    keys = [*VARIANT, "task", "id"]
    if all(part.model.nunique() == 1 for part in parts) and parts[0].model[0] != parts[1].model[0]:
        facts.append(f"the models differ: {parts[0].model[0]} and {parts[1].model[0]}")
        keys = keys[1:]
    both = parts[0].merge(parts[1], on=keys, suffixes=("_a", "_b"))
    if both.empty:
        raise UsageError(f"{one} and {other} have no sample, task, system and alpha in common")
    unmatched = [f"{len(part) - len(both)} only in {folder}" for part, folder in zip(parts, (one, other), strict=True)]
    facts.append(f"{len(both)} results in both, {' and '.join(unmatched)}; the difference is B - A, paired by sample")
    out = []
    for variant, part in both.groupby([name for name in VARIANT if name in keys]):
        tasks = dict(iter(part.groupby("task")))
        for name, groups in [*((name, [group]) for name, group in tasks.items()), (AVERAGE, list(tasks.values()))]:
            a, b = (interval([100 * g[f"score_{x}"].to_numpy() for g in groups])[0] for x in "ab")
            diff = paired([100 * (g.score_b - g.score_a).to_numpy() for g in groups])
            row = dict(zip([name for name in VARIANT if name in keys], variant, strict=True), task=name)
            row |= dict(n=sum(map(len, groups)), A=a, B=b, diff=diff[0], low=diff[1], high=diff[2], p=diff[3])
            out.append(row)
    return pd.DataFrame(out).round(4), facts
