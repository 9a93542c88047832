"""A comparison of systems as a table, a page with figures, and the last system's trace."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from hillinfer.assets import machine
from hillinfer.longbench.comparison import Result
from hillinfer.workbench.figures import hits_figure, systems_figure, timeline_figure
from hillinfer.workbench.report import write_report

HEADER = ["system", "answers\nright", "tokens\nattended", "hits % on\ndev/host/drv", "drive\nKiB/token"]
HEADER += ["ms/\ntoken", "KV KiB\nmemory"]
FORCED = "KL and agreement: next-token distributions against full's, the reference answer forced on both; right if all "
FORCED += "its tokens are the most likely ones."
FIDELITY = ["KL to\nfull", "top-1\nagree"]


def table_of(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and a row per system; with the fidelity where it was measured."""
    forced = bool(results[0].kl)
    rows = [
        [
            result.system,
            f"{sum(result.right)}/{len(result.right)} {result.accuracy:.0%}",
            f"{result.mean('attended'):,.0f}/{result.mean('cached'):,.0f}",
            "/".join(f"{100 * result.rate(tier):.0f}" for tier in ("device", "host", "drive")),
            f"{result.mean('drive_bytes_per_token') / 1024:,.0f}",
            f"{result.median('ms_per_token'):.1f}",
            f"{result.memory() / 1024:,.0f}",
            *([f"{fmean(result.kl):.2g}", f"{fmean(result.agree):.0%}"] if forced else []),
        ]
        for result in results
    ]
    return HEADER + FIDELITY * forced, rows


def write_comparison(results: Sequence[Result], guess: float, folder: Path) -> list[str]:
    """Write `report.html` and `timeline.json`; returns the facts of the comparison and where the files are.

    guess  expected accuracy of guessing among the entries that share half of the queried key
    """
    last, (header, rows) = results[-1], table_of(results)
    facts = [
        f"Guessing among the entries that share half of the queried key would score {guess:.0%}.",
        f"Measured on {machine()}; times are medians over the questions.",
        "Tokens attended: mean per step and layer. KV in memory: records, codes, hit table; largest question.",
        *([FORCED] if last.kl else []),
    ]
    figures = [
        systems_figure([r.system for r in results], [r.accuracy for r in results], guess, "Answers right"),
        *(timeline_figure(r.cache.timeline, f"{r.system}: the last steps of the last question") for r in results),
        hits_figure(last.cache.counters, f"{last.system}: tokens attended by tier, last question"),
    ]
    trace = last.cache.timeline.save(folder / "timeline.json")
    page = write_report(folder / "report.html", "hillinfer demo", facts, header, rows, figures)
    return [*facts, f"timeline ({last.system}, last question; open in ui.perfetto.dev): {trace}", f"report: {page}"]
