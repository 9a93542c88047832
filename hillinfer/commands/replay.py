"""`hillinfer replay`: the modelled cost of a step on other hardware, as a table, a plot and a CSV."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import progress, say, show_table, split_list

OUT = Path("out/replay")
SHOWN = 8  # tables on the terminal; the report and the CSV have all


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
    lists = split_list(profile), split_list(model_shape), [job.RECORDED] if recording else split_list(systems)
    lists += job.parse_sizes(context), job.parse_sizes(batch), split_list(alpha, float)
    wanted = job.cells(*lists, [None] if host_budget is None else split_list(host_budget))
    with progress() as shown:
        bar = shown.add_task("cells", total=len(wanted))
        frame = job.sweep(wanted, jobs, recording, lambda count: shown.update(bar, completed=count))
    from hillinfer.workbench.replays import named, write_sweep
    from hillinfer.workbench.report import format_rows

    groups = list(named(frame).groupby(["profile", "model", "alpha", "host", "batch"], sort=False))
    for (profile, model, alpha, host, batch), part in groups[:SHOWN]:
        wide = part.pivot(index="system", columns="context", values="ms").loc[part.system.unique()]
        wide = wide.map("{:,.0f}".format, na_action="ignore")
        say(f"ms per step, modelled on {profile}: {model}, batch {batch}, alpha {alpha:g}, host memory {host}")
        show_table(["system", *map("{:,}".format, wide)], format_rows(wide.reset_index()))
    if len(groups) > SHOWN:
        say(f"... and {len(groups) - SHOWN} more tables, in the report")
    say(*write_sweep(frame, wanted, recording, out_dir))
