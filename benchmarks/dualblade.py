"""DUAL-BLADE's page-cache path, direct path and both together, measured side by side in a memory cgroup.

    python -m benchmarks.dualblade --drive FOLDER [--mib 1024] [--repeats 5] [--out out/dualblade.csv]

A stack of attention layers without a model (8 KV heads of 128, bf16, batch 1: 4 KiB per token and layer), filled with
random KV, decodes with exact attention. Each measurement runs in its own process and cgroup, which leaves `KV / ratio`
bytes for the page cache. The three variants alternate. The cgroup needs root.
"""

import argparse
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.memory_cgroup import CgroupError, MemoryCgroup
from hillinfer.config import Settings
from hillinfer.evaluator.policies import Full
from hillinfer.layer import Layer
from hillinfer.pipeline.memory import read_memory
from hillinfer.systems.lossless.plan import DIRECT, NEAR
from hillinfer.systems.lossless.run import StreamedRun
from hillinfer.tiers.block_file import BLOCK

LAYERS, HEADS, GROUP, DIM = 16, 8, 4, 128
TOKEN = 2 * HEADS * DIM * 2  # bytes per token and layer
RATIOS = (0.5, 1, 2, 4)  # KV bytes over the page cache that the cgroup leaves
WAYS = ("page-cache", "direct", "dual")
WARM, STEPS = 2, 5
OWN = 40 << 20  # memory of the process itself in bytes, measured
KILLED = "the process ended without a result; was it killed for memory?"


def decode(stream: str, tokens: int, drive: Path, pipelining: str = "intra", budget: int | None = None) -> dict:
    """Fill and decode in this process. Returns seconds and bytes read from storage by step, and the plan's figures."""
    torch.set_num_threads(1)
    settings = Settings(
        drive=drive, stream=stream, max_tokens=tokens + 64, pipelining=pipelining, host_budget=budget, io_threads=16
    )
    run = StreamedRun(settings, LAYERS)
    layers = [Layer(i, Full(), run) for i in range(LAYERS)]
    random = torch.empty(2, 1, HEADS, 2048, DIM, dtype=torch.bfloat16).normal_()
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            for start in range(0, tokens, 1024):
                for i, layer in enumerate(layers):
                    at = (start * 7 + i * 531) % 1024
                    layer.append(*random[:, :, :, at : at + min(1024, tokens - start)])
            for layer in layers:  # finish all writes before the reads are timed
                for tensor in run.tensors.pair(layer.index):
                    tensor.settle()
            for path in run.tensors.paths.values():
                os.fdatasync(path.fd)
            filled = time.perf_counter() - began
            query, steps = torch.randn(1, HEADS * GROUP, 1, DIM, dtype=torch.bfloat16), []
            for step in range(WARM + STEPS):
                read, start = _storage_bytes(), time.perf_counter()
                for layer in layers:
                    layer.append(*random[:, :, :, step : step + 1])
                    layer.attend(query, None, DIM**-0.5)
                steps.append((time.perf_counter() - start, _storage_bytes() - read))
        plan = run.tensors.plan
        return {
            "seconds": [seconds for seconds, _ in steps[WARM:]],
            "read": [nbytes for _, nbytes in steps[WARM:]],
            "near": plan.bound[NEAR] * BLOCK,
            "direct": plan.bound[DIRECT] * BLOCK,
            "budget": plan.budget * BLOCK,
            "filled": filled,
            "memory": read_memory(),
            "told": run.why_split(),
        }
    finally:
        run.stop()


def _storage_bytes() -> int:
    """Bytes that this process has read from storage, excluding page-cache hits."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(dict(lines)["read_bytes"])


def in_cgroup(limit: int, **arguments) -> dict:
    """`decode` in a separate process under this memory limit."""
    context = mp.get_context("fork")  # torch is loaded once, and charged to the parent
    receive, send = context.Pipe(duplex=False)

    def work(group: MemoryCgroup) -> None:
        group.join()
        try:
            send.send(decode(**arguments))
        except BaseException as error:
            send.send({"error": f"{type(error).__name__}: {error}"})
            raise

    with MemoryCgroup(limit) as group:
        process = context.Process(target=work, args=(group,))
        process.start()
        send.close()
        try:
            result = receive.recv()
        except EOFError:
            result = {"error": KILLED}
        process.join()
        result["refaults"] = group.stat("workingset_refault_file")
    if "error" in result:
        raise RuntimeError(f"{arguments}: {result['error']}")
    return result


def limit_for(tokens: int, ratio: float) -> int:
    """Memory limit that leaves KV / ratio bytes for the page cache, besides the process and its buffers."""
    layer = (tokens + 64) * TOKEN
    return int(LAYERS * tokens * TOKEN / ratio) + 2 * layer + min(64 << 20, layer) + OWN


def measure(mib: int, repeats: int, drive: Path, ratios=RATIOS, ways=WAYS, report=print) -> list[dict]:
    """One row per ratio, variant and repeat; the variants alternate within a repeat."""
    tokens = (mib << 20) // (LAYERS * TOKEN)
    rows = []
    for ratio in ratios:
        for repeat in range(repeats):
            for way in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:
                with tempfile.TemporaryDirectory(dir=drive) as folder:
                    arguments = dict(stream=way, tokens=tokens, drive=Path(folder))
                    try:
                        cell = in_cgroup(limit_for(tokens, ratio), **arguments)
                    except (
                        RuntimeError
                    ) as error:  # cgroup v1 may kill a process that dirties pages faster than writeback
                        if KILLED not in str(error) or way != "page-cache":
                            raise
                        report(f"KV {ratio:g}x the cache, {way}: killed for memory while filling the cache; retrying")
                        cell = in_cgroup(limit_for(tokens, ratio), **arguments)
                total = LAYERS * tokens * TOKEN
                near = total * cell["near"] / (cell["near"] + cell["direct"])
                missed = max(0, statistics.median(cell["read"]) - (total - near))
                row = {
                    "ratio": ratio,
                    "way": way,
                    "repeat": repeat,
                    "ms": 1e3 * statistics.median(cell["seconds"]),
                    "near_share": near / total,
                    "hit_rate": max(0.0, 1 - missed / near) if near else None,
                    "refaults": cell["refaults"],
                    "fill_s": cell["filled"],
                    "budget": cell["budget"],
                    "limit": cell["memory"].limit,
                    "anonymous": cell["memory"].anonymous,
                }
                rows.append(row)
                hit = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}"
                report(
                    f"KV {ratio}x the cache, {way:10}: {row['ms']:6.0f} ms a step, {row['near_share']:4.0%} near, "
                    f"hit rate {hit}, filled in {row['fill_s']:.1f} s, limit {row['limit'] >> 20} MiB "
                    f"({row['anonymous'] >> 20} anonymous)"
                )
    return rows


def table(rows: list[dict]) -> "pandas.DataFrame":  # noqa: F821
    """Medians over the repeats, with the range of the times."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    grouped = frame.groupby(["ratio", "way"])
    out = grouped[["ms", "near_share", "hit_rate"]].median()
    out["fastest"], out["slowest"] = grouped.ms.min(), grouped.ms.max()
    return out.reset_index()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drive", type=Path, default=Path("out"))
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS))
    parser.add_argument("--out", type=Path, default=Path("out/dualblade.csv"))
    words = parser.parse_args()
    words.drive.mkdir(parents=True, exist_ok=True)
    try:
        rows = measure(words.mib, words.repeats, words.drive, words.ratios)
    except CgroupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words.out.parent.mkdir(parents=True, exist_ok=True)
    medians = table(rows)
    medians.to_csv(words.out, index=False)
    print(medians.round(3).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
