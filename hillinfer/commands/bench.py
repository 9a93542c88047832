"""One table over every system: the same questions, interleaved, and what each answer took. `hillinfer bench`.

Nothing heavy is imported before it is needed, so that a wrong option is refused at once.
"""

import ctypes
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hillinfer import files
from hillinfer.config import Settings
from hillinfer.errors import UsageError

if TYPE_CHECKING:
    import pandas

WIDTH = 126  # of the table
COLUMNS = {  # of the table, from those of the summary
    "system": "system",
    "exact": "exact",
    "right": "answers\nright",
    "attended": "tokens\nattended",
    "hits": "hits % on\ndev/host/drv",
    "lanes": "KiB/token on\ncpu/gpu/drv/link",
    "ms": "ms/token\n(quartiles)",
    "kv_kib": "KV KiB\nin memory",
    "peak_mib": "peak MiB\nbeyond idle",
}


def bench(
    systems: Annotated[str, typer.Option(help="Systems, separated by commas, or all.")] = "all",
    task: Annotated[str, typer.Option(help="lines, needle, two_hop, passage, chain or majority.")] = "lines",
    context: Annotated[int, typer.Option(min=256, help="Prompt length in tokens, about.")] = 2048,
    alpha: Annotated[float, typer.Option(help="Share of the tokens that a step attends to, in (0, 1].")] = 0.2,
    n: Annotated[int, typer.Option("--n", min=1, help="Questions.")] = 8,
    host_budget: Annotated[str | None, typer.Option(help="Host memory for KV, such as 64MiB.")] = None,
    drive: Annotated[Path | None, typer.Option(help="Folder on the drive; by default one under --out.")] = None,
    seen: Annotated[bool, typer.Option(help="Let the prefill see the question.")] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("out/bench"),
):
    """Ask every system the same questions: one table of accuracy, traffic, time and memory, also as JSON and CSV."""
    Settings(alpha=alpha, host_budget=host_budget, drive=drive)  # refuse bad input before torch loads
    from rich.console import Console

    from hillinfer.commands.demo import machine

    with tempfile.TemporaryDirectory(dir=_made(out_dir)) as folder:
        options = dict(alpha=alpha, host_budget=host_budget, drive=drive or folder)
        frame, left_out = measure(systems, task, context, n, options, seen)
    table = summary(frame)
    where = "in the prefill" if seen else "token by token after the prefill"
    facts = [
        f"{n} questions of {task} at about {context} tokens, alpha {alpha}; the question comes {where}.",
        f"Measured on {machine()}; ms per token: median and quartiles over the questions, systems taking turns.",
        "Memory: KV records, codes and tables; and the process's peak while it answers, less what it held before.",
        *left_out,
    ]
    files.write_text(out_dir / "answers.csv", frame.to_csv(index=False))
    files.write_text(out_dir / "table.csv", table.to_csv(index=False))
    rows = json.loads(table.to_json(orient="records"))
    files.write_text(out_dir / "table.json", json.dumps({"setting": facts, "systems": rows}, indent=1))
    console = Console()
    console.width = max(console.width, WIDTH)  # rather wrapped on a narrow terminal than cut
    console.print(show(table))
    for fact in facts:
        console.print(fact, soft_wrap=True, highlight=False, markup=False)
    console.print(f"table and answers as JSON and CSV: {out_dir}", soft_wrap=True)


def measure(systems: str, task: str, context: int, n: int, options: dict, seen: bool = False):
    """A frame with a row for each question and system, all measured, and why systems were left out."""
    import pandas as pd
    import torch
    from transformers import AutoConfig

    from hillinfer.assets import data_folder
    from hillinfer.commands.demo import load_embedded, options_of
    from hillinfer.longbench.runner import ask, is_right
    from hillinfer.longbench.synthetic import PROMPTS, make_records
    from hillinfer.seam import disable, enable
    from hillinfer.systems.planning import plan
    from hillinfer.systems.registry import find_system, list_systems, make_cache

    if task not in PROMPTS:
        raise UsageError(f"no task '{task}'; choose one of {', '.join(PROMPTS)}")
    names = list(list_systems()) if systems == "all" else [name.strip() for name in systems.split(",")]
    chosen, left_out = {}, []
    for name in names:
        own = options_of(name, options)
        try:
            chosen[name] = own, find_system(name, own)[0].policy.exact
        except UsageError as error:
            if systems != "all":
                raise
            left_out.append(f"left out: {error}")
    config = AutoConfig.from_pretrained(data_folder("model"))
    if context > (window := config.max_position_embeddings):
        raise UsageError(f"{context} tokens exceed the model's window of {window}; ask for a shorter --context")
    for name, (own, _) in chosen.items():
        plan(config, find_system(name, own)[1], context + 128, torch.float32)
    model, tokenizer = load_embedded()
    before, rows = enable(model), []
    try:
        for index, record in enumerate(make_records(task, context, n, seed=77)):
            for name, (own, exact) in chosen.items():
                held = _reset_peak()
                with make_cache(model, name, **own) as cache:
                    answer = ask(model, tokenizer, record, cache, seen)
                    spans = cache.timeline.spans
                    bounds = [span.detail["bounds"] for span in spans if "bounds" in span.detail]
                kv = sum(size for kind, size in answer.memory.items() if kind != "drive")
                rows.append(
                    {"question": index, "system": name, "exact": exact, "right": is_right(record, answer.text)}
                    | {"attended": answer.attended, "cached": answer.cached, "ms_per_token": answer.ms_per_token}
                    | {f"hit_{tier}": share for tier, share in answer.rates.items()}
                    | {f"{lane}_bytes_per_token": nbytes for lane, (_, nbytes) in answer.lanes.items()}
                    | {"bounds": sum(bounds) / len(bounds) if bounds else None, "kv_bytes": kv}
                    | {"peak_bytes": _peak() - held}
                )
    finally:
        disable(model, before)
    return pd.DataFrame(rows), left_out


def summary(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """One row for each system, from `measure`'s."""
    groups = frame.groupby("system", sort=False)
    means = groups[[c for c in frame if c.startswith("hit_") or c.endswith("_bytes_per_token") or c == "bounds"]].mean()
    return (
        groups.agg(exact=("exact", "first"), right=("right", "sum"), questions=("right", "size"))
        .join(groups[["attended", "cached"]].mean())
        .join(
            groups.ms_per_token.quantile([0.25, 0.5, 0.75]).unstack().set_axis(["ms_q1", "ms_median", "ms_q3"], axis=1)
        )
        .join(means)
        .join(groups[["kv_bytes", "peak_bytes"]].max())
        .reset_index()
    )


def show(table: "pandas.DataFrame"):
    """The summary as a rich table."""
    from rich import box
    from rich.table import Table

    view = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, header in COLUMNS.items():
        view.add_column(header, justify="left" if name == "system" else "right", no_wrap=True)
    for row in table.itertuples():
        lanes = [getattr(row, f"{lane}_bytes_per_token") / 1024 for lane in ("cpu", "gpu", "drive", "link")]
        view.add_row(
            row.system,
            "exact" if row.exact else "lossy",
            f"{row.right}/{row.questions}",
            f"{row.attended:,.0f}/{row.cached:,.0f}",
            "/".join(f"{100 * share:.0f}" for share in (row.hit_device, row.hit_host, row.hit_drive)),
            "/".join(f"{lane:,.0f}" for lane in lanes),
            f"{row.ms_median:.1f} ({row.ms_q1:.1f}-{row.ms_q3:.1f})",
            f"{row.kv_bytes / 1024:,.0f}",
            f"{row.peak_bytes / 2**20:,.0f}",
        )
    return view


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {folder} ({error.strerror}); name another folder with --out") from None
    return folder


def _reset_peak() -> int:
    """Give freed memory back, start the peak anew, and return what is held now: the GPU's memory if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
