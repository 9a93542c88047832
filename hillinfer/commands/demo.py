"""`hillinfer demo`: long-context questions, answered by several systems side by side."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import progress, say, show_table, split_list, working
from hillinfer.commands.options import Alpha, Drive, DriveKind, HostBudget, Precision
from hillinfer.config import Settings, check_folder
from hillinfer.errors import UsageError

TOKENS, QUESTIONS = 1500, 4  # of a real model: minutes on two cores with 0.5 B parameters


def demo(
    model: Annotated[str, typer.Option(help="Folder, hub id or GGUF file; asked for codes in a novel.")] = "embedded",
    tokens: Annotated[int | None, typer.Option(help=f"A real model's prompt, in tokens; by default {TOKENS}.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help=f"To a real model; by default {QUESTIONS}.")] = None,
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
    if model == "embedded" and (tokens or questions):
        raise UsageError("the embedded model has questions of its own; give --tokens and --questions with --model NAME")
    if drive is None:
        settings["drive"] = out_dir / "drive"
        settings["drive"].mkdir(parents=True, exist_ok=True)
    names = split_list(systems)
    from hillinfer.longbench.comparison import compare, compare_forced, demo_records, floor
    from hillinfer.systems.registry import find_system, options_of
    from hillinfer.workbench.comparison import table_of, write_comparison

    for name in names:
        find_system(name, options_of(name, settings))
    if model == "embedded":
        from hillinfer.assets import load_embedded

        loaded, records, ask, about = load_embedded(), demo_records(), compare, "2K to 4K tokens"
        guess = floor(records)
    else:
        from transformers import AutoTokenizer

        from hillinfer.loading import load_model, load_pretrained
        from hillinfer.longbench.needles import FLOOR, make_needles

        tokens = tokens or TOKENS
        records = make_needles(load_pretrained(AutoTokenizer, model), tokens, questions or QUESTIONS)
        with working(f"loading {model}"):
            loaded, ask, about = load_model(model), compare_forced, f"{tokens} tokens"
        names, guess = dict.fromkeys(("full", *names)), FLOOR
    with progress() as bars:
        tasks = {name: bars.add_task(name, total=len(records)) for name in names}
        results = ask(*loaded, records, names, settings, lambda result: bars.advance(tasks[result.system]))
    show_table(*table_of(results), f"{len(records)} questions, documents of {about}, alpha {alpha}")
    say(*write_comparison(results, guess, out_dir))
