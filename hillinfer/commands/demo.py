"""`hillinfer demo`: the embedded model's long-context questions, answered by several systems side by side."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import progress, say, show_table, split_list
from hillinfer.commands.options import Alpha, Drive, DriveKind, HostBudget, Precision
from hillinfer.config import Settings, check_folder

HEADER = ["system", "answers\nright", "tokens\nattended", "hits % on\ndev/host/drv", "drive\nKiB/token"]
HEADER += ["ms/\ntoken", "KV KiB\nmemory"]


def demo(
    alpha: Alpha = 0.2,
    host_budget: HostBudget = None,
    drive: Drive = None,
    drive_kind: DriveKind = "ssd",
    precision: Precision = "int8",
    systems: Annotated[str, typer.Option(help="Systems to compare, separated by commas.")] = "full,streaming,hillinfer",
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("out/demo"),
):
    """Answer the same long-context questions with several systems, and compare accuracy, time and traffic."""
    settings = dict(alpha=alpha, host_budget=host_budget, drive=drive, drive_kind=drive_kind, precision=precision)
    check_folder(Settings(**settings).drive)  # refuse bad input before torch loads
    if drive is None:
        settings["drive"] = out_dir / "drive"
        settings["drive"].mkdir(parents=True, exist_ok=True)
    names = split_list(systems)
    from hillinfer.assets import load_embedded
    from hillinfer.longbench.comparison import compare, demo_records
    from hillinfer.systems.registry import find_system, options_of

    for name in names:
        find_system(name, options_of(name, settings))
    (model, tokenizer), records = load_embedded(), demo_records()
    with progress() as bars:
        tasks = {name: bars.add_task(name, total=len(records)) for name in names}
        results = compare(model, tokenizer, records, names, settings, lambda result: bars.advance(tasks[result.system]))
    show(results, records, alpha, out_dir)


def show(results: list, records: list[dict], alpha: float, folder: Path) -> None:
    """Print the table, and write it with figures as HTML, and the last system's trace."""
    from hillinfer.assets import machine
    from hillinfer.longbench.comparison import floor
    from hillinfer.workbench.figures import hits_figure, systems_figure, timeline_figure
    from hillinfer.workbench.report import write_report

    guess, last = floor(records), results[-1]
    rows = [
        [
            result.system,
            f"{sum(result.right)}/{len(records)} {result.accuracy:.0%}",
            f"{result.mean('attended'):,.0f}/{result.mean('cached'):,.0f}",
            "/".join(f"{100 * result.rate(tier):.0f}" for tier in ("device", "host", "drive")),
            f"{result.mean('drive_bytes_per_token') / 1024:,.0f}",
            f"{result.median('ms_per_token'):.1f}",
            f"{result.memory() / 1024:,.0f}",
        ]
        for result in results
    ]
    show_table(HEADER, rows, f"{len(records)} questions, documents of 2K to 4K tokens, alpha {alpha}")
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
    page = write_report(folder / "report.html", "hillinfer demo", facts, HEADER, rows, figures)
    say(*facts, f"timeline ({last.system}, last question; open in ui.perfetto.dev): {trace}", f"report: {page}")
