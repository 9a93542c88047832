"""Why a decode step took as long as it did, and where a run's time went: from the record of its spans and hits."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean, median

from hillinfer.errors import UsageError
from hillinfer.timeline import Counters, Timeline

WORK = {  # what the decoding thread was at -> its kinds of span
    "the model's own work": "dense attend",
    "selecting": "select score encode index merge guess",
    "moving records in memory": "gather view append swap transfer",
    "reading the drive": "read abstract evaluate",
    "waiting for a prefetch": "wait",
    "observing attention": "observe",
    "outside all spans": "",  # Python, and whatever else the machine did
}
KIND = {kind: work for work, kinds in WORK.items() for kind in kinds.split()}
OUTSIDE, DRIVE, READS = "outside all spans", ("reading the drive", "waiting for a prefetch"), ("read", "prefetch")
SLOW, SLOWER = 1.25, 1.5  # times the median step, and its drive
FIGURES = {  # of a `Cost`, beside its work -> unit
    "read from the drive": "MiB",
    "the drive's reads": "MiB/s",
    "selected tokens": "tokens",
    "missed, never in the pool": "tokens",
    "of them, not selected before": "tokens",
    "missed, demoted before": "tokens",
    "prefetched": "tokens",
    "prefetched, not selected": "tokens",
}


@dataclass(frozen=True)
class Explanation:
    """A sentence, and the table behind it."""

    step: int  # the one explained; of a run, its slowest
    cause: str  # slow drive, cold pool, demoted tokens, wrong guesses or a name in WORK; "" for a step that is not slow
    sentence: str
    columns: tuple[str, str]
    rows: list[tuple[str, str, float, float]]  # what, unit, and its value in each column

    def __str__(self) -> str:
        lines = (f"{name:28}{one:>14,.1f}{other:>22,.1f} {unit}" for name, unit, one, other in self.rows)
        return "\n".join([self.sentence, "{:28}{:>14}{:>22}".format("", *self.columns), *lines])


def explain(cache, step: int | None = None) -> Explanation:
    """Why a decode step took as long as it did, compared with the median of the others; None explains the whole run.

    cache  a `TieredCache`, closed or not, or whatever has a `timeline` and `counters`

    Raises UsageError if the step, or any, was not recorded.
    """
    found = costs(cache.timeline, cache.counters)
    if not found or (step is not None and step not in found):
        raise UsageError(f"no decode step{'' if step is None else f' {step}'} was recorded: generate first")
    if step is None:
        return _of_run(found)
    one, others = found[step], [cost for at, cost in found.items() if at != step] or [found[step]]
    usual = {name: median(cost[name] for cost in others) for name in one}
    cause, why = _cause(one, usual)
    times = one["time"] / max(1e-9, usual["time"])
    sentence = f"Step {step} took {one['time']:.1f} ms, {times:.1f} times the median step: {why}."
    return Explanation(step, cause, sentence, ("this step", "median step"), _rows(one, usual))


def costs(timeline: Timeline, counters: Counters) -> dict[int, dict[str, float]]:
    """Each decode step's `time` and WORK in ms, and its FIGURES. A step ends where the next one begins."""
    found: dict[int, dict[str, float]] = {
        row.step: dict.fromkeys(["time", *WORK, *FIGURES], 0.0) for row in counters.rows
    }
    own = next((span.thread for span in timeline.spans if span.kind in ("attend", "append")), "")
    mine, read_ms = defaultdict(list), defaultdict(float)
    for span in sorted(timeline.spans, key=lambda span: span.start_ns):
        if span.step in found and span.thread == own and span.kind not in ("draft", "verify"):
            mine[span.step].append(span)
        if span.step in found and span.kind in READS:
            found[span.step]["read from the drive"] += span.bytes / 2**20
            read_ms[span.step] += (span.end_ns - span.start_ns) / 1e6
    starts = [part[0].start_ns for part in mine.values()]
    for (step, part), end in zip_longest(mine.items(), starts[1:]):
        cost, last = found[step], max(span.end_ns for span in part)
        cost["time"] = ((last if end is None else end) - part[0].start_ns) / 1e6
        for span, inner in zip(part, [*part[1:], None], strict=True):  # of nested spans the inner one counts
            until = span.end_ns if inner is None else min(span.end_ns, inner.start_ns)
            cost[KIND.get(span.kind, OUTSIDE)] += (until - span.start_ns) / 1e6
        cost[OUTSIDE] += max(0.0, cost["time"] - sum(cost[work] for work in WORK))
        cost["the drive's reads"] = cost["read from the drive"] / read_ms[step] * 1e3 if read_ms[step] else 0.0
    for row in counters.rows:
        never, unused = row.drive - row.demoted, row.guessed - row.prefetched
        tokens = row.queries, never, row.fresh, row.demoted, row.guessed, unused
        for name, n in zip(list(FIGURES)[2:], tokens, strict=True):
            found[row.step][name] += n
    return {step: cost for step, cost in found.items() if cost["time"]}


def _cause(one: dict[str, float], usual: dict[str, float]) -> tuple[str, str]:
    """The cause of a slow step, and the reason in words."""
    more = {name: one[name] - usual[name] for name in one}
    drive = sum(more[name] for name in DRIVE)
    worst = max((name for name in WORK if name not in DRIVE), key=more.get)
    if one["time"] < SLOW * usual["time"]:
        return "", f"most of it was {max(WORK, key=one.get)}"
    if drive < more[worst]:
        return worst, f"{more[worst]:.1f} ms more were {worst}, which waited for no drive"
    waited = f"{drive:.1f} ms more went to the drive lane, which the decoding thread waited for"
    speed, before = one["the drive's reads"], usual["the drive's reads"]
    more_read = one["read from the drive"] / max(1e-9, usual["read from the drive"])
    if speed and before / speed > max(SLOWER, more_read):
        return "slow drive", f"{waited}; the drive was slow, {speed:,.0f} MiB/s instead of {before:,.0f}"
    kinds = {"cold pool": "missed, never in the pool", "demoted tokens": "missed, demoted before"}
    kinds["wrong guesses"] = "prefetched, not selected"
    cause = max(kinds, key=lambda kind: more[kinds[kind]])
    n, m = one[kinds[cause]], usual[kinds[cause]]
    said = {
        "cold pool": f"the pool was cold, {n:,.0f} selected tokens were never in it",
        "demoted tokens": f"{n:,.0f} selected tokens had been demoted from the pool",
        "wrong guesses": f"guesses were wrong, {n:,.0f} of {one['prefetched']:,.0f} prefetched tokens not selected",
    }[cause]
    return cause, f"{waited}; {said} (median {m:,.0f})"


def _of_run(found: dict[int, dict[str, float]]) -> Explanation:
    slowest = max(found, key=lambda step: found[step]["time"])
    mean = {name: fmean(cost[name] for cost in found.values()) for name in found[slowest]}
    shares = sorted(WORK, key=lambda work: -mean[work])
    parts = ", ".join(f"{mean[work] / mean['time']:.0%} {work}" for work in shares[:3])
    missed = mean["missed, never in the pool"] + mean["missed, demoted before"]
    sentence = f"{len(found)} steps took {mean['time']:.1f} ms each: {parts}. "
    sentence += f"{missed / max(1, mean['selected tokens']):.0%} of the selected tokens came from the drive"
    if mean["prefetched"]:
        sentence += (
            f"; {mean['prefetched, not selected'] / mean['prefetched']:.0%} of the prefetched ones were not selected"
        )
    return Explanation(
        slowest, shares[0], sentence + ".", ("mean step", f"step {slowest}, the slowest"), _rows(mean, found[slowest])
    )


def _rows(one: dict[str, float], other: dict[str, float]) -> list[tuple[str, str, float, float]]:
    units = {"time": "ms"} | dict.fromkeys(WORK, "ms") | FIGURES
    return [(name, unit, one[name], other[name]) for name, unit in units.items() if max(one[name], other[name]) >= 0.05]
