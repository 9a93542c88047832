"""`hillinfer demo`: the embedded model's long-context questions, answered by several systems side by side."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import progress, say, show_table, split_list
from hillinfer.commands.options import Alpha, Drive, DriveKind, HostBudget, Precision
from hillinfer.config import Settings, check_folder


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
    from hillinfer.workbench.comparison import HEADER, rows_of, write_comparison

    show_table(HEADER, rows_of(results), f"{len(records)} questions, documents of 2K to 4K tokens, alpha {alpha}")
    say(*write_comparison(results, records, out_dir))
