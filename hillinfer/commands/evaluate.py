"""`hillinfer eval`: systems, budgets and models on long-context tasks."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hillinfer.config import Settings
from hillinfer.errors import UsageError

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
QUESTIONS, DTYPES = ("stepwise", "prefilled"), ("auto", "float32", "bfloat16", "float16")
GROUPS = "own, longbench, longbench-en, longbench-e, longbench-v2, quest, auto, or names of tasks."


def evaluate(
    model: Annotated[str, typer.Option(help="Folders or hub ids, by commas; 'embedded' ships.")] = "embedded",
    tasks: Annotated[str, typer.Option(help=GROUPS)] = "own",
    systems: Annotated[str, typer.Option(help="By commas, or all; full is always added.")] = "streaming,topk,hillinfer",
    alpha: Annotated[str, typer.Option(help="Shares of the tokens that a step attends to, by commas.")] = "0.2",
    samples: Annotated[int, typer.Option(min=0, help="Of each task, drawn with the seed; 0 is all.")] = 4,
    data: Annotated[list[Path] | None, typer.Option(help="Folder or data.zip of LongBench; may be repeated.")] = None,
    revision: Annotated[str, typer.Option(help="Of the hub's data set, where it is downloaded.")] = "main",
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for results; a run that was stopped goes on there.")
    ] = Path("out/eval"),
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="dask:HOST:PORT, ray or ray:ADDRESS.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt in tokens; by default LongBench's rule for the window.")
    ] = None,
    chat: Annotated[bool | None, typer.Option(help="Chat template; by default where the tokenizer has one.")] = None,
    question: Annotated[str, typer.Option(help="stepwise, or prefilled with the document.")] = "stepwise",
    drive: Annotated[
        Path | None,
        typer.Option(help="Folder on the drive; by default --out; on a cluster the one for temporary files."),
    ] = None,
    drive_kind: Annotated[str | None, typer.Option(help="ssd or emulated.")] = None,
    host_budget: Annotated[str | None, typer.Option(help="Host memory for KV records, such as 64MiB.")] = None,
    precision: Annotated[str | None, typer.Option(help="int8 or int4, of the key codes.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    prefill_chunk: Annotated[int | None, typer.Option(min=2, help="Prefill so many tokens at once.")] = None,
    share_prefill: Annotated[bool, typer.Option(help="One prefill for all systems of a sample.")] = True,
    seed: Annotated[int, typer.Option(help="Of the samples, and of torch.")] = 42,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Compare two --out folders, and stop.")] = None,
):
    """Score systems on long-context tasks: LongBench, LongEval, RULER's files, and the tasks that ship."""
    if compare is not None:
        return show_comparison(*compare)
    if question not in QUESTIONS or dtype not in DTYPES:
        raise UsageError(f"question is {' or '.join(QUESTIONS)}, dtype {', '.join(DTYPES)}; not {question} and {dtype}")
    given = dict(drive_kind=drive_kind, host_budget=host_budget, precision=precision)
    options = {name: value for name, value in given.items() if value is not None}
    alphas = numbers(alpha)
    for value in alphas:
        Settings(alpha=value, drive=drive, **options)  # refuse bad input before torch loads
    from hillinfer.commands.demo import machine
    from hillinfer.longbench import metrics, report, sources, sweep
    from hillinfer.longbench import models as loader
    from hillinfer.longbench.results import Results
    from hillinfer.systems.registry import list_systems
    from hillinfer.workbench.evaluation import write_page

    ways = sweep.ways_of(list_systems() if systems == "all" else words(systems), alphas, options)
    loaded = sources.load_all(words(tasks), data or [], revision)
    metrics.check_libraries([task for task, _, _ in loaded])
    asking = sweep.Asking(
        max_length, chat, question, dtype, prefill_chunk, threads, seed, share_prefill, tuple(options.items())
    )
    models = {name: loader.describe(name, chat) for name in words(model)}
    drawn = [(task, sweep.sample(records, samples, seed)) for task, records, _ in loaded]
    place = drive or (None if cluster else folder)  # a cluster's machines need not have our folders
    jobs = [  # each task's first sample, and so on: the time left can be told early, and half a run is a balanced half
        sweep.Job(name, loader.model_path(name), task, records[i], tuple(ways), asking, place and str(place.resolve()))
        for name in models
        for i in range(max(len(records) for _, records in drawn))
        for task, records in drawn
        if i < len(records)
    ]
    hardware = machine().partition(", torch")[0]  # versions are told apart from it
    with Results(folder) as results:
        results.begin(asking.identity(), models, [source for _, _, source in loaded], sys.argv, hardware)
        left = sweep.plan(jobs, results.done())
        missing, total = sum(len(job.ways) for job in left), len(jobs) * len(ways)
        columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=err) as progress:
            bar = progress.add_task("answers", total=total, completed=total - missing)
            for answers in sweep.run_all(left, workers, cluster):
                results.append(answers)
                progress.advance(bar, len(answers))
    table, cost, facts = report.write(folder)
    summary = report.summary(table, cost)
    page = write_page(folder, table, cost, summary, facts)
    for fact in facts:
        out.print(fact, markup=False, highlight=False)
    show(summary)
    out.print(f"{folder}: report.md, {page.name}, scores.csv, costs.csv, results.jsonl, manifest.json", highlight=False)


def show_comparison(one: Path, other: Path) -> None:
    from hillinfer.longbench import report

    table, facts = report.compare(one, other)
    for fact in [f"A is {one}, B is {other}.", *facts]:
        out.print(fact, markup=False, highlight=False)
    show(table)


def show(frame) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in frame.columns:
        table.add_column(str(name), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=None if out.is_terminal else 200).print(table, markup=False)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in words(text)]
    except ValueError:
        raise UsageError(f"alpha '{text}' is no list of numbers; write 0.1,0.2") from None
