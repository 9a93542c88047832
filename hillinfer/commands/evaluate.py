"""`hillinfer eval`: scores of systems, budgets and models on long-context tasks."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import progress, say, show_table, split_list
from hillinfer.commands.options import DTYPES, Dtype, HostBudget, PrefillChunk
from hillinfer.config import Settings, check_folder
from hillinfer.errors import UsageError

OUT = Path("out/eval")
FIDELITY = {"": (), "reference": ("reference",), "own": ("own",), "both": ("reference", "own")}
GROUPS = "own, longbench, longbench-en, longbench-e, longbench-v2, quest, auto, or names of tasks."


def evaluate(
    model: Annotated[str, typer.Option(help="Folders, .gguf files or hub ids, by commas; or embedded.")] = "embedded",
    tasks: Annotated[str, typer.Option(help=GROUPS)] = "own",
    systems: Annotated[str, typer.Option(help="By commas, or all; full is always added.")] = "streaming,topk,hillinfer",
    alpha: Annotated[str, typer.Option(help="Values of alpha, separated by commas.")] = "0.2",
    samples: Annotated[int, typer.Option(min=0, help="Samples per task, drawn with the seed; 0 takes all.")] = 4,
    data: Annotated[list[Path] | None, typer.Option(help="LongBench folder or data.zip; repeatable.")] = None,
    revision: Annotated[str, typer.Option(help="Revision of the hub's data set, if it is downloaded.")] = "main",
    folder: Annotated[Path, typer.Option("--out", help="Folder for results; resumes a stopped run.")] = OUT,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="dask:HOST:PORT, ray or ray:ADDRESS.")] = None,
    max_length: Annotated[int | None, typer.Option(min=16, help="Prompt limit in tokens; default LongBench's.")] = None,
    chat: Annotated[bool | None, typer.Option(help="Chat template; by default if the tokenizer has one.")] = None,
    question: Annotated[str, typer.Option(help="stepwise, prefilled with the document, or both.")] = "stepwise",
    fidelity: Annotated[str, typer.Option(help="Teacher-forced against full: reference, own, or both.")] = "",
    answers: Annotated[bool, typer.Option(help="Without answers, only fidelity is measured.")] = True,
    exact: Annotated[bool, typer.Option(help="Verify drafts with all KV: the full cache's answers.")] = False,
    times: Annotated[bool, typer.Option(help="Decode one system at a time, to measure its time.")] = False,
    drive: Annotated[Path | None, typer.Option(help="By default --out; on a cluster, a temporary folder.")] = None,
    drive_kind: Annotated[str | None, typer.Option(help="ssd or emulated.")] = None,
    host_budget: HostBudget = None,
    precision: Annotated[str | None, typer.Option(help="Precision of the key codes: int8, int4 or int2.")] = None,
    per_head: Annotated[bool, typer.Option(help="In memory, each KV head selects for itself.")] = True,
    dtype: Dtype = "auto",
    prefill_chunk: PrefillChunk = None,
    store: Annotated[Path | None, typer.Option(help="Folder of prompts' KV: no document is prefilled twice.")] = None,
    share_prefill: Annotated[bool, typer.Option(help="One prefill for all systems of a sample.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of torch.")] = 42,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Compare two --out folders, and stop.")] = None,
):
    """Score systems on long-context tasks: LongBench, LongEval, RULER and the bundled tasks."""
    if compare is not None:
        from hillinfer.longbench.report import compare as compare_folders
        from hillinfer.workbench.report import format_rows

        table, facts = compare_folders(*compare)
        say(f"A is {compare[0]}, B is {compare[1]}.", *facts)
        return show_table(list(table), format_rows(table))
    if store is not None and not share_prefill:
        raise UsageError("--store keeps the prefill that systems share: leave out --no-share-prefill")
    if dtype not in DTYPES:
        raise UsageError(f"no dtype '{dtype}'; choose {', '.join(DTYPES)}")
    if fidelity not in FIDELITY:
        raise UsageError(f"no fidelity '{fidelity}'; choose reference, own or both")
    if not (answers or fidelity):
        raise UsageError("without answers there is nothing to measure: add --fidelity reference")
    options = dict(drive_kind=drive_kind, host_budget=host_budget, precision=precision)
    options = {name: value for name, value in options.items() if value is not None}
    options |= {} if per_head else {"per_head": False}
    for value in (alphas := split_list(alpha, float)):
        Settings(alpha=value, **options)  # refuse bad input before torch loads
    check_folder(drive)
    from hillinfer.longbench import report
    from hillinfer.longbench.fidelity_table import shown
    from hillinfer.longbench.job import EvalSettings
    from hillinfer.longbench.plan import Evaluation
    from hillinfer.longbench.sweep import run_all
    from hillinfer.systems.registry import list_systems
    from hillinfer.workbench.evaluation import write_page
    from hillinfer.workbench.report import format_rows

    names = list_systems() if systems == "all" else split_list(systems)
    asked = dict(max_length=max_length, chat=chat, dtype=dtype, prefill_chunk=prefill_chunk, threads=threads, seed=seed)
    asked |= dict(answers=answers, fidelity=FIDELITY[fidelity], options=tuple(options.items()), times=times)
    asked |= dict(exact=exact, share_prefill=share_prefill, store=store and str(store.expanduser().absolute()))
    settings = EvalSettings(**asked)
    lists = split_list(model), split_list(tasks), names, alphas
    evaluation = Evaluation(folder, *lists, samples, question, data or [], revision, settings, drive, cluster)
    with evaluation.opened(sys.argv) as (results, left, total):
        missing = sum(len(job.variants) for job in left)
        with progress() as bars:
            bar = bars.add_task("answers", total=total, completed=total - missing)
            for rows in run_all(left, workers, cluster):
                results.append(rows)
                bars.advance(bar, len(rows))
    table, cost, close, facts = report.write(folder)
    summary = report.summary(table, cost)
    facts += ["Decoded exactly: each system's selection drafts, and all KV verifies."] * exact
    facts += [f"Weights of {name}: {about['dtype']}." for name, about in evaluation.described.items()]
    page = write_page(folder, table, cost, close, summary, facts)
    say(*facts)
    for part in (summary, shown(close)):
        if not part.empty:
            show_table(list(part), format_rows(part))
    say(f"{folder}: report.md, {page.name}, scores.csv, costs.csv, results.jsonl, manifest.json")
