"""A comparison of systems as a table, a page with figures, and the last system's trace."""

from collections.abc import Sequence
from pathlib import Path

from hillinfer.assets import machine
from hillinfer.longbench.comparison import Result, floor
from hillinfer.workbench.figures import hits_figure, systems_figure, timeline_figure
from hillinfer.workbench.report import write_report

HEADER = ["system", "answers\nright", "tokens\nattended", "hits % on\ndev/host/drv", "drive\nKiB/token"]
HEADER += ["ms/\ntoken", "KV KiB\nmemory"]


def rows_of(results: Sequence[Result]) -> list[list[str]]:
    """A row per system, under HEADER."""
    return [
        [
            result.system,
            f"{sum(result.right)}/{len(result.right)} {result.accuracy:.0%}",
            f"{result.mean('attended'):,.0f}/{result.mean('cached'):,.0f}",
            "/".join(f"{100 * result.rate(tier):.0f}" for tier in ("device", "host", "drive")),
            f"{result.mean('drive_bytes_per_token') / 1024:,.0f}",
            f"{result.median('ms_per_token'):.1f}",
            f"{result.memory() / 1024:,.0f}",
        ]
        for result in results
    ]


def write_comparison(results: Sequence[Result], records: Sequence[dict], folder: Path) -> list[str]:
    """Write `report.html` and `timeline.json`; returns the facts of the comparison and where the files are."""
    guess, last = floor(records), results[-1]
    facts = [
        f"Guessing among the entries that share half of the queried key would score {guess:.0%}.",
        f"Measured on {machine()}; times are medians over the questions.",
        "Tokens attended: mean per step and layer. KV in memory: records, codes, hit table; largest question.",
    ]
    figures = [
        systems_figure([r.system for r in results], [r.accuracy for r in results], guess, "Answers right"),
        *(timeline_figure(r.cache.timeline, f"{r.system}: the last steps of the last question") for r in results),
        hits_figure(last.cache.counters, f"{last.system}: tokens attended by tier, last question"),
    ]
    trace = last.cache.timeline.save(folder / "timeline.json")
    page = write_report(folder / "report.html", "hillinfer demo", facts, HEADER, rows_of(results), figures)
    return [*facts, f"timeline ({last.system}, last question; open in ui.perfetto.dev): {trace}", f"report: {page}"]
