"""`hillinfer bench`: every system in one table of accuracy, traffic, time and memory."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hillinfer import files
from hillinfer.commands.console import say, show_table, split_list, working
from hillinfer.commands.options import Alpha, Drive, HostBudget
from hillinfer.config import Settings, check_folder
from hillinfer.errors import UsageError

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
    exact: Annotated[bool, typer.Option(help="Verify drafts with all KV: the full cache's answers.")] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("out/bench"),
):
    """Ask every system the same questions, and write one table to the terminal, as JSON and as CSV."""
    check_folder(Settings(alpha=alpha, host_budget=host_budget, drive=drive).drive)  # refuse bad input before torch
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {out_dir} ({error.strerror}); name another folder with --out") from None
    from hillinfer.assets import machine
    from hillinfer.longbench.bench import measure, summary

    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        options = dict(alpha=alpha, host_budget=host_budget, drive=drive or folder)
        with working("asking every system in turn"):
            frame, left_out = measure(split_list(systems), task, context, n, options, seen, exact)
    table = summary(frame)
    where = "in the prefill" if seen else "token by token after the prefill"
    where += "; selections draft, and all KV verifies in one pass" if exact else ""
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
