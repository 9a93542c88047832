"""Measure systems on the same bundled questions: accuracy, traffic, time and memory of each answer, as a table."""

import ctypes
import math
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig

from hillinfer.assets import load_embedded
from hillinfer.errors import UsageError
from hillinfer.loading import load_pretrained
from hillinfer.longbench.comparison import Result, compare
from hillinfer.longbench.synthetic import PROMPTS, make_records
from hillinfer.pipeline.memory import read_fields
from hillinfer.speculative import check_draft
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system, list_systems, options_of

STATUS = Path("/proc/self/status")


def measure(
    systems: list[str], task: str, context: int, n: int, options: dict, seen: bool = False, verify: bool = False
) -> tuple[pd.DataFrame, list[str]]:
    """A frame with one row per question and system, and a line for each system that cannot run with these options.

    systems  names, or ["all"]; UsageError if a system that was named cannot run
    verify   decode exactly: systems that select draft, and all KV verifies
    """
    if task not in PROMPTS:
        raise UsageError(f"no task '{task}'; choose one of {', '.join(PROMPTS)}")
    exact, left_out, config = {}, [], load_pretrained(AutoConfig, "embedded")
    for name in list_systems() if systems == ["all"] else systems:
        try:
            system, settings = find_system(name, options_of(name, options))
            if verify and not system.policy.exact:
                check_draft(system.policy)
        except UsageError as error:
            if systems != ["all"]:
                raise
            left_out.append(f"left out: {error}")
            continue
        # Before weights are loaded; `compare` plans the actual prompts.
        plan(config, settings, context, torch.float32, policy=system.policy, device=torch.device("cpu"))
        exact[name] = system.policy.exact or verify
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
    compare(model, tokenizer, records, exact, options, add_row, seen, verify)
    return pd.DataFrame(rows), left_out


def summary(frame: pd.DataFrame) -> pd.DataFrame:
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


def reset_peak() -> int:
    """Return freed memory to the system and restart the peak; gives the bytes in use. The embedded model runs there."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return read_fields(STATUS)["VmRSS"] * 1024


def peak_memory() -> int:
    """The peak since `reset_peak`, in bytes."""
    return read_fields(STATUS)["VmHWM"] * 1024
