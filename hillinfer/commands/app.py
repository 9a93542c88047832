"""The command line: hillinfer demo | run | eval | bench | replay | systems | profile | stamp | doctor | lab."""

import os
import sys
from pathlib import Path
from typing import Annotated

# Waiting threads that spin slow a busy small machine down tenfold and more; this must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hillinfer.commands import doctor
from hillinfer.commands.bench import bench
from hillinfer.commands.console import clear_errors, err, out
from hillinfer.commands.evaluate import evaluate
from hillinfer.commands.profile import profile
from hillinfer.commands.replay import replay
from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.pipeline.memory import check_libraries

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(clear_errors()(replay))

Alpha = Annotated[float, typer.Option(help="Share of the tokens that a step attends to, in (0, 1].")]
Budget = Annotated[
    str | None, typer.Option(help="Host memory for KV records, such as 64MiB; by default 2*alpha of them.")
]
Kind = Annotated[str, typer.Option(help="ssd; xrt, a SmartSSD; or emulated, a process that stands for one.")]
Precision = Annotated[str, typer.Option(help="int8 or int4, of the key codes that are scored.")]


@app.command()
def demo(
    alpha: Alpha = 0.2,
    host_budget: Budget = None,
    drive: Annotated[Path | None, typer.Option(help="Folder on the drive; by default one under --out.")] = None,
    drive_kind: Kind = "ssd",
    precision: Precision = "int8",
    systems: Annotated[str, typer.Option(help="Systems to compare, separated by commas.")] = "full,streaming,hillinfer",
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("out/demo"),
):
    """Answer the same long-context questions with several systems, and show what each took."""
    with clear_errors():
        settings = dict(alpha=alpha, host_budget=host_budget, drive=drive, drive_kind=drive_kind, precision=precision)
        Settings(**settings)  # refuse bad input before torch loads
        if drive is None:
            settings["drive"] = out_dir / "drive"
            settings["drive"].mkdir(parents=True, exist_ok=True)
        names = [name.strip() for name in systems.split(",")]
        from hillinfer.commands import demo as job
        from hillinfer.systems.registry import find_system

        for name in names:
            find_system(name, job.options_of(name, settings))
        model, tokenizer = job.load_embedded()
        records = job.demo_records()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=err, transient=True) as progress:
            bars = {name: progress.add_task(name, total=len(records)) for name in names}
            results = job.compare(
                model,
                tokenizer,
                records,
                names,
                settings,
                lambda name, done: progress.update(bars[name], completed=done),
            )
        show(results, records, alpha, out_dir)


def show(results, records: list[dict], alpha: float, folder: Path) -> None:
    """The table on the terminal, and the same with figures as HTML, and the trace."""
    from hillinfer.commands import demo as job
    from hillinfer.workbench.figures import hits_figure, systems_figure, timeline_figure
    from hillinfer.workbench.report import write_report

    floor, last = job.floor(records), results[-1]
    header = ["system", "answers\nright", "tokens\nattended", "hits % on\ndev/host/drv", "drive\nKiB/token"]
    header += ["ms/\ntoken", "KV KiB\nmemory"]
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
    table = Table(
        title=f"{len(records)} questions, documents of 2K to 4K tokens, alpha {alpha}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in header:
        table.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    facts = [
        f"A solver without a model that knows one half of the asked key gets {floor:.0%}.",
        f"Measured on {job.machine()}; times are medians over the questions.",
        "Tokens attended: mean for each step and layer. KV in memory: records, codes, hit table; largest question.",
    ]
    for fact in facts:
        out.print(fact, soft_wrap=True)
    trace = last.cache.timeline.save(folder / "timeline.json")
    names = [result.system for result in results]
    figures = [
        systems_figure(names, [result.accuracy for result in results], floor, "Answers right"),
        *(
            timeline_figure(result.cache.timeline, f"{result.system}: the last question's last steps")
            for result in results
        ),
        hits_figure(last.cache.counters, f"{last.system}: who served the attended tokens, last question"),
    ]
    page = write_report(folder / "report.html", "hillinfer demo", facts, header, rows, figures)
    out.print(
        f"timeline ({last.system}, last question; open in ui.perfetto.dev): {trace}\nreport: {page}", soft_wrap=True
    )


@app.command()
def run(
    model: Annotated[
        str, typer.Option(help="Folder or hub id of a decoder-only model; 'embedded' for the one that ships.")
    ],
    prompt_file: Annotated[Path | None, typer.Option(help="Text to continue.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The same, in place of a file.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text that comes before the prompt.")] = None,
    session: Annotated[
        Path | None, typer.Option(help="Keeps the document's KV: made if it does not exist, else opened.")
    ] = None,
    system: Annotated[str, typer.Option(help="full, streaming, topk, hillinfer, ...")] = "hillinfer",
    alpha: Alpha = 0.2,
    host_budget: Budget = None,
    drive: Annotated[Path | None, typer.Option(help="Folder on the drive for the cold KV.")] = None,
    drive_kind: Kind = "ssd",
    xclbin: Annotated[Path | None, typer.Option(help="The SmartSSD's kernel, for --drive-kind xrt.")] = None,
    precision: Precision = "int8",
    profile: Annotated[
        Path | None, typer.Option(help="What `hillinfer profile` wrote, to balance host and drive.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    prefill_chunk: Annotated[
        int | None, typer.Option(min=2, help="Prefill so many tokens at once: less memory.")
    ] = None,
    device: Annotated[
        Path | None,
        typer.Option(help="Stamped block device, or /dev/ngXnY, for dualblade's and flexgen's direct path."),
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="More than one needs all KV in memory.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    trace: Annotated[Path | None, typer.Option(help="Write the timeline here, for ui.perfetto.dev.")] = None,
):
    """Continue a long text with a model whose KV is spread over the tiers."""
    with clear_errors():
        options = dict(alpha=alpha, host_budget=host_budget, drive=drive)
        options |= dict(drive_kind=drive_kind, xclbin=xclbin, precision=precision, profile=profile)
        Settings(**options)  # refuse bad input before torch loads
        if device is not None:
            options["device"] = device
        if num_beams > 1 and drive is not None:
            raise UsageError(
                "beam search would copy whole caches on the drive: use --num-beams 1, or leave out --drive"
            )
        if (prompt is None) == (prompt_file is None):
            raise UsageError("give the text to continue, either with --prompt-file FILE or with --prompt TEXT")
        if num_beams > 1 and (document or session):
            raise UsageError("a document is prefilled for one sequence: use --num-beams 1 with --document or --session")
        text = prompt if prompt_file is None else read_prompt(prompt_file)
        if not text.strip():
            raise UsageError("the prompt is empty; give the text to continue")
        before = None if document is None else read_prompt(document)
        check_libraries()
        from hillinfer.commands import run as continuation

        job = continuation.Job(text, before, session, max_new_tokens, num_beams, dtype, prefill_chunk)
        result = continuation.run(model, job, system, options)
        out.print(result.text, markup=False, highlight=False, soft_wrap=True)
        for line in result.facts:
            err.print(line, soft_wrap=True)
        if trace is not None:
            err.print(f"timeline (open in ui.perfetto.dev): {result.timeline.save(trace)}", soft_wrap=True)


app.command()(clear_errors()(profile))


@app.command()
def stamp(device: Annotated[Path, typer.Argument(help="An empty block device, such as /dev/nvme1n1.")]):
    """Mark an empty block device as hillinfer's, so that dualblade and flexgen may write KV to it."""
    from hillinfer.systems.hardware.raw_device import DeviceRefused
    from hillinfer.systems.hardware.raw_device import stamp as mark

    with clear_errors():
        try:
            mark(device)
        except DeviceRefused as error:
            raise UsageError(str(error)) from None
        out.print(f"{device} is now hillinfer's: run with --device {device}", soft_wrap=True)


@app.command()
def systems():
    """List the systems that demo and run know."""
    from hillinfer.systems.registry import list_systems

    table = Table(box=None, show_header=False)
    for name, system in list_systems().items():
        table.add_row(name, escape(system.about) + (" [dim](needs --drive)[/]" if system.needs_drive else ""))
    out.print(table)


app.command("eval")(clear_errors()(evaluate))
app.command()(clear_errors()(bench))
app.command()(clear_errors()(doctor.doctor))


@app.command()
def lab(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to put the notebooks; by default those of the clone.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8888,
):
    """Open the notebooks in JupyterLab: on this machine only, with a token."""
    with clear_errors():
        from hillinfer.workbench.lab import open_lab

        open_lab(folder, browser, port)


def read_prompt(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({error}); give a UTF-8 text file") from None
    if not text.strip():
        raise UsageError(f"{path} is empty; put the text in it")
    return text


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
