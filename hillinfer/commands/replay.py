"""`hillinfer replay`: the modelled cost of a step on other hardware, as a table, a plot and a CSV."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from hillinfer.commands.console import out, progress

SHOWN = 8  # tables on the terminal; the report and the CSV have all


def replay(
    profile: Annotated[str, typer.Option(help="Device profiles, separated by commas; or a file.")] = "rtx4090-smartssd",
    model_shape: Annotated[str, typer.Option(help="llama-3.1-8b, opt-6.7b, qwen-7b, ...")] = "llama-3.1-8b",
    context: Annotated[str, typer.Option(help="4096, 4k,16k, or 4k..128k, which doubles.")] = "4k..128k",
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "1,8",
    systems: Annotated[str, typer.Option(help="all, or names separated by commas; ignored with --run.")] = "all",
    alpha: Annotated[str, typer.Option(help="Shares of the tokens that a step attends to.")] = "0.2",
    host_budget: Annotated[
        str | None, typer.Option(help="Host memory for KV, such as 4GiB,16GiB; by default all.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A trace of `hillinfer run --trace` to replay, scaled to each cell.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; -1 for one per core.")] = -1,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the table, the plot and a trace.")] = Path(
        "out/replay"
    ),
):
    """Model decode steps on other hardware, of a recorded run or of every system by its stated traffic."""
    from hillinfer.whatif import sweep as job

    recording = None if run is None else job.load_run(run)
    wanted = job.cells(
        job.parse_list(profile),
        job.parse_list(model_shape),
        [job.RECORDED] if recording else job.parse_list(systems),
        job.parse_sizes(context),
        job.parse_sizes(batch),
        job.parse_list(alpha, float),
        [None] if host_budget is None else job.parse_list(host_budget),
    )
    with progress() as shown:
        bar = shown.add_task("cells", total=len(wanted))
        frame = job.sweep(wanted, jobs, recording, lambda count: shown.update(bar, completed=count))
    show(frame, wanted, recording, out_dir)


def show(frame, wanted, recording, folder: Path) -> None:
    """Tables on the terminal; the CSV, the report and the timeline of the last cell in the folder."""
    from hillinfer import files
    from hillinfer.whatif.devices import find_profile
    from hillinfer.whatif.sweep import timeline
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
    facts = [f"{len(frame)} cells, all modelled; {int(frame.ms.isna().sum())} do not fit (reasons in the CSV)"]
    for name, profile in profiles.items():
        counts = ", ".join(f"{n} {how}" for how, n in profile.sources().items() if n)
        facts.append(f"{name}: {profile.about}; numbers {counts}")
    fitting = [cell for cell, ms in zip(wanted, frame.ms, strict=True) if ms == ms]
    if fitting:
        last = fitting[-1]
        trace = timeline(last, profiles[last.profile], recording).save(folder / "timeline.json")
        facts.append(f"timeline of the last cell ({last.system}): {trace}")
    table_file = files.write_text(folder / "replay.csv", frame.to_csv(index=False))
    header = ["profile", "model", "system", "context", "batch", "alpha", "host memory", "ms", "bound by", "note"]
    rows = [
        [c.profile, c.model, c.system, f"{c.context:,}", f"{c.batch}", f"{c.alpha:g}", _size(c.host),
         f"{c.ms:,.1f}" if c.ms == c.ms else "-", c.bound, c.note]
        for c in frame.itertuples()
    ]  # fmt: skip
    figures = [sweep_figure(frame)]
    page = write_report(folder / "report.html", "hillinfer replay (modelled)", facts, header, rows, figures)
    for fact in [*facts, f"table: {table_file}\nplot: {page}"]:
        out.print(fact, soft_wrap=True, highlight=False)


def _size(host) -> str:
    return "all" if host is None or host != host else f"{host / 1e9:.1f} GB"
