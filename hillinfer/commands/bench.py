"""`hillinfer bench`: every system in one table of accuracy, traffic, time and memory."""

import ctypes
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hillinfer import files
from hillinfer.commands.console import say, show_table, split_list
from hillinfer.commands.options import Alpha, Drive, HostBudget
from hillinfer.config import Settings, check_folder
from hillinfer.errors import UsageError
from hillinfer.pipeline.memory import read_fields

if TYPE_CHECKING:
    import pandas

STATUS = Path("/proc/self/status")
HEADER = ["system", "exact", "answers\nright", "tokens\nattended", "hits % on\ndev/host/drv"]
HEADER += ["KiB/token on\ncpu/gpu/drv/link", "ms/token\n(quartiles)", "KV KiB\nin memory", "peak MiB\nabove idle"]


def bench(
    systems: Annotated[str, typer.Option(help="Systems, separated by commas, or all.")] = "all",
    task: Annotated[str, typer.Option(help="lines, needle, two_hop, passage, chain or majority.")] = "lines",
    context: Annotated[int, typer.Option(min=256, help="Approximate prompt length in tokens.")] = 2048,
    alpha: Alpha = 0.2,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of questions.")] = 8,
    host_budget: HostBudget = None,
    drive: Drive = None,
    seen: Annotated[bool, typer.Option(help="Prefill the question together with the document.")] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("out/bench"),
):
    """Ask every system the same questions, and write one table to the terminal, as JSON and as CSV."""
    check_folder(Settings(alpha=alpha, host_budget=host_budget, drive=drive).drive)  # refuse bad input before torch
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {out_dir} ({error.strerror}); name another folder with --out") from None
    from hillinfer.assets import machine

    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        options = dict(alpha=alpha, host_budget=host_budget, drive=drive or folder)
        frame, left_out = measure(systems, task, context, n, options, seen)
    table = summary(frame)
    where = "in the prefill" if seen else "token by token after the prefill"
    facts = [
        f"{n} questions of {task} at about {context} tokens, alpha {alpha}; the question comes {where}.",
        f"Measured on {machine()}; ms per token: median and quartiles over the questions, systems taking turns.",
        "Memory: KV records, codes and tables; and the process's peak while it answers, above its memory before.",
        *left_out,
    ]
    files.write_text(out_dir / "answers.csv", frame.to_csv(index=False))
    files.write_text(out_dir / "table.csv", table.to_csv(index=False))
    rows = json.loads(table.to_json(orient="records"))
    files.write_text(out_dir / "table.json", json.dumps({"setting": facts, "systems": rows}, indent=1))
    show_table(HEADER, map(cells, table.itertuples()))
    say(*facts, f"table and answers as JSON and CSV: {out_dir}")


def measure(systems: str, task: str, context: int, n: int, options: dict, seen: bool = False):
    """A frame with one row per question and system, and a line for each system that cannot run with these options.

    Raises UsageError if a system that was named cannot run.
    """
    import pandas as pd
    import torch
    from transformers import AutoConfig

    from hillinfer.assets import load_embedded, load_pretrained
    from hillinfer.longbench.comparison import Result, compare
    from hillinfer.longbench.synthetic import PROMPTS, make_records
    from hillinfer.systems.planning import plan
    from hillinfer.systems.registry import find_system, list_systems, options_of

    if task not in PROMPTS:
        raise UsageError(f"no task '{task}'; choose one of {', '.join(PROMPTS)}")
    exact, left_out, config = {}, [], load_pretrained(AutoConfig, "embedded")
    for name in list_systems() if systems == "all" else split_list(systems):
        try:
            system, settings = find_system(name, options_of(name, options))
        except UsageError as error:
            if systems != "all":
                raise
            left_out.append(f"left out: {error}")
            continue
        plan(config, settings, context, torch.float32)  # before weights are loaded; `compare` plans the actual prompts
        exact[name] = system.policy.exact
    rows, idle = [], 0

    def add_row(result: Result) -> None:
        nonlocal idle
        peak, answer, name = peak_memory() - idle, result.answers[-1], result.system
        bounds = [span.detail["bounds"] for span in result.cache.timeline.spans if "bounds" in span.detail]
        row = dict(question=len(result.answers) - 1, system=name, exact=exact[name], right=result.right[-1])
        row |= dict(attended=answer.attended, cached=answer.cached, ms_per_token=answer.ms_per_token)
        row |= {f"hit_{tier}": share for tier, share in answer.rates.items()}
        row |= {f"{lane}_bytes_per_token": nbytes for lane, (_, nbytes) in answer.lanes.items()}
        row |= dict(bounds=sum(bounds) / len(bounds) if bounds else math.nan)
        rows.append(row | dict(kv_bytes=answer.memory_bytes, peak_bytes=peak))
        idle = reset_peak()

    records, (model, tokenizer) = make_records(task, context, n, seed=77), load_embedded()
    idle = reset_peak()
    compare(model, tokenizer, records, exact, options, add_row, seen)
    return pd.DataFrame(rows), left_out


def summary(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """One row per system, from the frame of `measure`."""
    means = [c for c in frame if c.startswith("hit_") or c.endswith("_bytes_per_token") or c == "bounds"]
    quartiles = {"ms_q1": 0.25, "ms_median": 0.5, "ms_q3": 0.75}
    return frame.groupby("system", sort=False, as_index=False).agg(
        **dict(exact=("exact", "first"), right=("right", "sum"), questions=("right", "size")),
        **{name: (name, "mean") for name in ("attended", "cached")},
        **{name: ("ms_per_token", lambda ms, q=q: ms.quantile(q)) for name, q in quartiles.items()},
        **{name: (name, "mean") for name in means},
        **{name: (name, "max") for name in ("kv_bytes", "peak_bytes")},
    )


def cells(row) -> list[str]:
    """One row of the summary as the terminal shows it."""
    traffic = [getattr(row, f"{lane}_bytes_per_token") / 1024 for lane in ("cpu", "gpu", "drive", "link")]
    return [
        row.system,
        "exact" if row.exact else "lossy",
        f"{row.right}/{row.questions}",
        f"{row.attended:,.0f}/{row.cached:,.0f}",
        "/".join(f"{100 * share:.0f}" for share in (row.hit_device, row.hit_host, row.hit_drive)),
        "/".join(f"{kib:,.0f}" for kib in traffic),
        f"{row.ms_median:.1f} ({row.ms_q1:.1f}-{row.ms_q3:.1f})",
        f"{row.kv_bytes / 1024:,.0f}",
        f"{row.peak_bytes / 2**20:,.0f}",
    ]


def reset_peak() -> int:
    """Return freed memory to the system and restart the peak; gives the bytes in use, of the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return read_fields(STATUS)["VmRSS"] * 1024


def peak_memory() -> int:
    """The peak since `reset_peak`, in bytes."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else read_fields(STATUS)["VmHWM"] * 1024
