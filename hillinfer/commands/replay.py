"""`hillinfer replay`: the modelled cost of a step on other hardware, as a table, a plot and a CSV."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import format_rows, progress, say, show_table, split_list

OUT = Path("out/replay")
SHOWN = 8  # tables on the terminal; the report and the CSV have all
COLUMNS = ["profile", "model", "system", "context", "batch", "alpha", "host memory", "ms", "bound by", "note"]


def replay(
    profile: Annotated[str, typer.Option(help="Device profiles, separated by commas; or a file.")] = "rtx4090-smartssd",
    model_shape: Annotated[str, typer.Option(help="Model shapes: llama-3.1-8b, opt-6.7b, ...")] = "llama-3.1-8b",
    context: Annotated[str, typer.Option(help="Lengths: 4096 or 4k,16k or (doubling) 4k..128k.")] = "4k..128k",
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "1,8",
    systems: Annotated[str, typer.Option(help="all, or names separated by commas; ignored with --run.")] = "all",
    alpha: Annotated[str, typer.Option(help="Fractions of the cached tokens that a step attends to.")] = "0.2",
    host_budget: Annotated[str | None, typer.Option(help="Host memory for KV: 4GiB,16GiB; by default all.")] = None,
    run: Annotated[Path | None, typer.Option(help="Trace of `hillinfer run --trace`, replayed at each size.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes; -1 for one per core.")] = -1,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the table, the plot and a trace.")] = OUT,
):
    """Model decode steps on other hardware: a recorded run's, or each system's by its rules."""
    from hillinfer.whatif import sweep as job

    recording = None if run is None else job.load_run(run)
    wanted = job.cells(
        split_list(profile),
        split_list(model_shape),
        [job.RECORDED] if recording else split_list(systems),
        job.parse_sizes(context),
        job.parse_sizes(batch),
        split_list(alpha, float),
        [None] if host_budget is None else split_list(host_budget),
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

    named = frame.assign(host=["all" if host != host else f"{host / 1e9:.1f} GB" for host in frame.host.astype(float)])
    groups = list(named.groupby(["profile", "model", "alpha", "host", "batch"], sort=False))
    for (profile, model, alpha, host, batch), part in groups[:SHOWN]:
        wide = part.pivot(index="system", columns="context", values="ms").loc[part.system.unique()]
        wide = wide.map("{:,.0f}".format, na_action="ignore")
        say(f"ms per step, modelled on {profile}: {model}, batch {batch}, alpha {alpha:g}, host memory {host}")
        show_table(["system", *map("{:,}".format, wide)], format_rows(wide.reset_index()))
    if len(groups) > SHOWN:
        say(f"... and {len(groups) - SHOWN} more tables, in the report")
    profiles = {name: find_profile(name) for name in frame.profile.unique()}
    facts = [f"{len(frame)} cells, all modelled; {int(frame.ms.isna().sum())} do not fit (reasons in the CSV)"]
    for name, profile in profiles.items():
        counts = ", ".join(f"{n} {how}" for how, n in profile.sources().items() if n)
        facts.append(f"{name}: {profile.about}; numbers {counts}")
    for last in [cell for cell, ms in zip(wanted, frame.ms, strict=True) if ms == ms][-1:]:
        trace = timeline(last, profiles[last.profile], recording).save(folder / "timeline.json")
        facts.append(f"timeline of the last cell ({last.system}): {trace}")
    table_file = files.write_text(folder / "replay.csv", frame.to_csv(index=False))
    named = named.rename(columns={"host": "host memory", "bound": "bound by"})[COLUMNS]
    rows, figures = format_rows(named, context="{:,}", ms="{:,.1f}"), [sweep_figure(frame)]
    page = write_report(folder / "report.html", "hillinfer replay (modelled)", facts, COLUMNS, rows, figures)
    say(*facts, f"table: {table_file}", f"plot: {page}")
