"""`hillinfer replay`: what a step would cost on other hardware, as a table, a plot and a CSV. All of it modelled."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hillinfer.errors import UsageError

out, err = Console(), Console(stderr=True)
SHOWN = 8  # tables on the terminal; the report and the CSV have all


def replay(
    profile: Annotated[str, typer.Option(help="Profiles, separated by commas; or a .toml file.")] = "rtx4090-smartssd",
    model_shape: Annotated[str, typer.Option(help="llama-3.1-8b, opt-6.7b, qwen-7b, ...")] = "llama-3.1-8b",
    context: Annotated[str, typer.Option(help="4096, 4k,16k, or 4k..128k, which doubles.")] = "4k..128k",
    batch: Annotated[str, typer.Option(help="Sequences at once, such as 1,8.")] = "1,8",
    systems: Annotated[str, typer.Option(help="all, or names separated by commas; not used with --run.")] = "all",
    alpha: Annotated[str, typer.Option(help="Shares of the tokens that a step attends to.")] = "0.2",
    host_budget: Annotated[
        str | None, typer.Option(help="Host memory that may hold KV, such as 4GiB,16GiB; all there is by default.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A trace of `hillinfer run --trace`: replay it, scaled to each cell.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; -1 for one on each core.")] = -1,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler to run on.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the table, the plot and a trace.")] = Path(
        "out/replay"
    ),
):
    """Model decode steps on other hardware: recorded runs by their own record, systems by their stated work."""
    from hillinfer.commands.console import clear_errors
    from hillinfer.whatif import sweep as job

    with clear_errors():
        recording = None if run is None else job.load_run(run)
        names = [job.RECORDED] if recording else job.list_of(systems)
        wanted = job.cells(
            job.list_of(profile),
            job.list_of(model_shape),
            names,
            job.parse_sizes(context),
            job.parse_sizes(batch),
            job.list_of(alpha, float),
            [None] if host_budget is None else job.list_of(host_budget),
        )
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with cluster(scheduler), Progress(*columns, console=err, transient=True) as progress:
            bar = progress.add_task("cells", total=len(wanted))
            frame = job.sweep(wanted, jobs, recording, lambda count: progress.update(bar, completed=count))
        show(frame, wanted, recording, out_dir)


def cluster(scheduler: str | None):
    """joblib on a Dask cluster for as long as the block lasts, or on this machine. UsageError where that cannot be."""
    if scheduler is None:
        return nullcontext()
    try:
        from dask.distributed import Client
    except ImportError:
        raise UsageError("--scheduler needs Dask: pip install 'hillinfer[cluster]'") from None
    import joblib

    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {scheduler} ({error}); start one, or leave it out") from None
    return joblib.parallel_config(backend="dask", client=client, wait_for_workers_timeout=30)


def show(frame, wanted, recording, folder: Path) -> None:
    from hillinfer.systems.shapes import find_shape
    from hillinfer.whatif import modelled, sweep
    from hillinfer.whatif import replay as replays
    from hillinfer.whatif.case import Case
    from hillinfer.whatif.devices import find_profile
    from hillinfer.workbench.replays import sweep_figure
    from hillinfer.workbench.report import write_report

    groups = list(frame.groupby(["profile", "model", "alpha", "host", "batch"], sort=False, dropna=False))
    for (profile, model, alpha, host, batch), part in groups[:SHOWN]:
        title = (
            f"ms per step, modelled on {profile}: {model}, batch {batch}, alpha {alpha:g}, host memory {_size(host)}"
        )
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        wide = part.pivot(index="system", columns="context", values="ms").loc[part.system.unique()]
        table.add_column("system", no_wrap=True)
        for context in wide.columns:
            table.add_column(f"{context:,}", justify="right", no_wrap=True)
        for row in wide.itertuples():
            table.add_row(escape(row[0]), *(f"{ms:,.0f}" if ms == ms else "-" for ms in row[1:]))
        out.print(title, soft_wrap=True, highlight=False)
        out.print(table)
    if len(groups) > SHOWN:
        out.print(f"... and {len(groups) - SHOWN} more tables, in the report")
    profiles = {name: find_profile(name) for name in frame.profile.unique()}
    facts = [
        f"{len(frame)} cells, all modelled; {int(frame.ms.isna().sum())} do not fit (reasons in the CSV)",
        *(f"{name}: {own.about}; numbers " + ", ".join(f"{n} {how}" for how, n in own.sources().items() if n)
          for name, own in profiles.items()),
    ]  # fmt: skip
    fitting = [cell for cell, ms in zip(wanted, frame.ms, strict=True) if ms == ms]
    if fitting:
        last = fitting[-1]
        shape, own = find_shape(last.model), profiles[last.profile]
        if recording:
            target = replays.Target(shape, last.context, last.batch, last.alpha)
            trace = replays.replay(recording, own, target, most=2)
        else:
            case = Case(own, shape, last.context, last.batch, last.alpha, last.host)
            trace = modelled.timeline(case, last.system)
        facts.append(f"timeline of the last cell ({last.system}): {trace.save(folder / 'timeline.json')}")
    table_file = sweep.save(frame, folder)
    header = ["profile", "model", "system", "context", "batch", "alpha", "host memory", "ms", "bound by", "note"]
    rows = [
        [c.profile, c.model, c.system, f"{c.context:,}", f"{c.batch}", f"{c.alpha:g}", _size(c.host),
         f"{c.ms:,.1f}" if c.ms == c.ms else "-", c.bound, c.note]
        for c in frame.itertuples()
    ]  # fmt: skip
    page = write_report(
        folder / "report.html", "hillinfer replay (modelled)", facts, header, rows, [sweep_figure(frame)]
    )
    for fact in [*facts, f"table: {table_file}\nplot: {page}"]:
        out.print(fact, soft_wrap=True, highlight=False)


def _size(host) -> str:
    return "all" if host is None or host != host else f"{host / 1e9:.1f} GB"
