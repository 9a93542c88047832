"""`make show-speed`: measure all claims about speed that can be checked on this machine.

PARTS=micro,overhead,real,memory,shape,dualblade selects parts; DRIVE=FOLDER sets the drive (default: out). The figures
of all parts are written to out/speed.json, for benchmarks.compare.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks import dualblade, micro, overhead, real, shape, stack
from benchmarks.claims import Claim, verdict
from benchmarks.memory_cgroup import CgroupError
from benchmarks.trace import record
from hillinfer.pipeline.memory import read_memory

PARTS = os.environ.get("PARTS", "micro,overhead,real,memory,shape,dualblade").split(",")
DRIVE = Path(os.environ.get("DRIVE", "out"))
TOKENS = 32_768
NEEDS = {"memory": (7, 2), "shape": (20, 33)}  # GB of memory and of the drive, where it is much


def at_least(text: str, ratio: tuple[float, float, float], bar: float) -> Claim:
    """A claim that a ratio, given by its quartiles, reaches a threshold."""
    low, middle, high = ratio
    return Claim(text, f"{middle:.2f}x ({low:.2f} to {high:.2f})", f"{bar}x or more", middle >= bar).show()


def kernels() -> tuple[dict, list[Claim]]:
    """Scoring against one core's read bandwidth, and a layer's overhead beyond its kernels."""
    with tempfile.TemporaryDirectory(dir=DRIVE) as folder:
        result = micro.measure(Path(folder))
    micro.show(result)
    rows, claims = {row["name"]: row for row in result["rows"]}, []
    for bits in (8, 4, 2):
        share = rows[f"score int{bits}"]["of_bound"]
        claims.append(
            Claim(f"INT{bits} scoring, of one core's read bandwidth", f"{share:.0%}", "60%", share >= 0.6).show()
        )
    most = max(row["beyond_us"] for row in result["seam"])
    claims.append(Claim("a layer's append and attend beyond the kernels", f"{most:.0f} us", "60 us", most <= 60).show())
    return result, claims


def full_budget() -> tuple[dict, list[Claim]]:
    """All tokens selected and in memory, against transformers' DynamicCache."""
    with torch.inference_mode():
        rows, claims = overhead.measure(), []
    for row in rows:
        low, high, bar = row["low_ms"], row["high_ms"], 0.95 if row["tokens"] == 128 else 1.0
        text = f"full against DynamicCache, {row['tokens']} tokens ({row['full_ms']:.2f} ms)"
        claims.append(at_least(text, (low, row["ratio_ms"], high), bar))
    return {"rows": rows}, claims


def embedded() -> tuple[dict, list[Claim]]:
    """The embedded model's whole step at alpha 0.1: in memory against both full attentions; the drive's systems too."""
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=DRIVE) as folder:
        result = real.measure(real.CONTEXTS, Path(folder))
    real.show(result)
    setting, found = f"all in memory, alpha {real.ALPHA}, {TOKENS} tokens, embedded model's whole step", []
    for other, bar in (("DynamicCache", 10), ("full", 3)):
        found.append(at_least(f"{setting}: against {other}", real.ratio(result, TOKENS, other, "topk"), bar))
    return {"rows": result["rows"]}, found


def in_memory() -> tuple[dict, list[Claim]]:
    """The 8B shape's attention with all KV in memory, at alpha 0.1 against both full attentions."""
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=DRIVE) as folder:
        result = shape.in_memory("8B", record(Path("out/trace.npz")), TOKENS, Path(folder))
    shape.show(result)
    claims, where = [], f"all in memory, alpha {shape.ALPHA}, {TOKENS} tokens, 8B shape"
    for fast in ("topk", "topk, int4"):
        for slow, bar in (("DynamicCache", 10), ("full", 3)):
            claims.append(at_least(f"{where}: {fast}, over {slow}", shape.ratio(result, slow, fast), bar))
    return {"rows": result["rows"]}, claims


def large_shape() -> tuple[dict, list[Claim]]:
    """The 8B shape on the drive."""
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=DRIVE) as folder:
        made = stack.Field(stack.SHAPES["8B"], record(Path("out/trace.npz")), TOKENS)
        result = shape.measure(made, shape.ways_of(), Path(folder))
    shape.show(result)
    claims, where = [], f"8B shape, {TOKENS} tokens, alpha {shape.ALPHA}"
    for fast, slow, bar in (
        (shape.TUNED, "flexgen", 8.56),
        (shape.TUNED + shape.EQUAL, "flexgen" + shape.EQUAL, 4),
        ("leoam", "flexgen", 8.56),
        ("leoam" + shape.EQUAL, "flexgen" + shape.EQUAL, 4),
    ):
        claims.append(at_least(f"{where}: {fast}, over {slow}", shape.ratio(result, slow, fast), bar))
    for row in result["rows"][:3]:
        figure = f"{row['over_bound']:.2f}x of {row['bound_ms']:.0f} ms ({row['longest_lane']})"
        text = f"{where}: {row['system']}, over its longest lane's bytes at that lane's bandwidth"
        claims.append(Claim(text, figure, "1.3x or less", row["over_bound"] <= 1.3).show())
        alone = f"{row['over_reads']:.2f}x of {row['reads_ms']:.0f} ms"
        text = f"{where}: {row['system']}, over the same number of reads of their mean size, nothing else going on"
        claims.append(Claim(text, alone, "1.3x or less", row["over_reads"] <= 1.3).show())
    return {key: result[key] for key in ("rows", "bandwidths")}, claims


def under_a_cgroup() -> tuple[dict, list[Claim]]:
    """DUAL-BLADE with KV of twice the page cache that the memory limit leaves."""
    text = "dualblade over page cache alone, KV twice the cache, in a memory cgroup"
    try:
        rows = dualblade.measure(1024, 5, DRIVE, (2,), ("page-cache", "dual"))
    except CgroupError as error:
        print(f"not measured here: {text}: {error}")
        return {}, []
    by = {(row["repeat"], row["way"]): row["ms"] for row in rows}
    pairs = sorted(by[repeat, "page-cache"] / by[repeat, "dual"] for repeat in range(5))
    return {"rows": rows}, [at_least(text, (pairs[1], pairs[2], pairs[3]), 1.5)]


def main() -> int:
    logging.disable_progress_bar()
    DRIVE.mkdir(parents=True, exist_ok=True)
    parts = {"micro": kernels, "overhead": full_budget, "real": embedded, "memory": in_memory}
    parts |= {"shape": large_shape, "dualblade": under_a_cgroup}
    if unknown := set(PARTS) - set(parts):
        print(f"error: no part {', '.join(unknown)}; choose among {', '.join(parts)}", file=sys.stderr)
        return 2
    memory, room = read_memory(), shutil.disk_usage(DRIVE).free
    for name in set(PARTS) & set(NEEDS):
        for need, there, what in zip(NEEDS[name], (memory.budget(), room), (memory.source, DRIVE), strict=True):
            if there < need * 1e9:
                print(f"error: part {name} needs {need} GB, but {what} has {there / 1e9:.0f} GB free", file=sys.stderr)
                return 2
    threads, claims, result = torch.get_num_threads(), [], {"facts": micro.facts(5)}
    for name in PARTS:
        torch.set_num_threads(threads)  # the kernels are measured on one
        measured, made = parts[name]()
        result |= {f"{name} {kind}": rows for kind, rows in measured.items() if isinstance(rows, list)}
        claims += made
    if not torch.cuda.is_available():
        print(
            "not measured here: transformers' offloaded cache and hillinfer on a GPU (python -m benchmarks.gpu): no GPU"
        )
    Path("out/speed.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
