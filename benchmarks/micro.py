"""Kernels against their roofline, measured in the same run: python -m benchmarks.micro [--out FILE] [--drive FOLDER]

A kernel's bound is its bytes over the measured bandwidth of one core or of the drive. Rounds are interleaved, so noise
affects all rows alike. Bounds of a core use CPU time, which other processes cannot distort. Llama-3-8B's layer shape.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hillinfer import native
from hillinfer.assets import machine
from hillinfer.config import Settings
from hillinfer.evaluator.codes import products, unpack
from hillinfer.evaluator.ranks import head_ranks_reference
from hillinfer.evaluator.segments import SEGMENT, segment_scores_torch
from hillinfer.evaluator.topk import topk, topk_reference
from hillinfer.growable import aligned
from hillinfer.layer import Layer
from hillinfer.native import ring
from hillinfer.run import Run
from hillinfer.systems.registry import POLICIES
from hillinfer.tiers.block_file import MAX_READ
from hillinfer.tiers.record_file import RecordFile

TOKENS, HEADS, GROUP, DIM, ALPHA = 32_768, 8, 4, 128, 0.1
RECORD = 2 * HEADS * DIM * 2  # bytes, in bf16
CORE = "read, one core"
CHOSEN = int(ALPHA * TOKENS)


@dataclass
class Row:
    """One measurement. `bound` names the row whose bandwidth is this row's upper bound.

    The baseline of "name" is the row "name, torch".
    """

    name: str
    nbytes: int
    work: Callable[[], object]
    bound: str | None = None
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def once(self) -> None:
        before, start = time.process_time(), time.perf_counter()
        self.work()
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - before)

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)


def memory_rows(rng: np.random.Generator) -> list[Row]:
    """Rows of one core, from memory: other rows evict a row's data from the caches between its turns."""
    words = np.ones(1 << 24, np.uint64)
    query = rng.integers(-127, 128, (HEADS, GROUP, DIM), np.int8)
    coded = {bits: rng.integers(-127, 128, (HEADS, TOKENS, DIM * bits // 8), np.int8) for bits in (8, 4)}
    scores = native.score(query, coded[8], 8)
    records = torch.randn(TOKENS, 2, HEADS, DIM, dtype=torch.bfloat16)
    chosen = np.sort(rng.choice(TOKENS, CHOSEN, replace=False))
    where, asked = records.data_ptr() + chosen * RECORD, torch.randn(1, HEADS * GROUP, DIM)
    out, taken = torch.empty_like(asked), torch.from_numpy(chosen)
    keys, codes = torch.randn(1, HEADS, 512, DIM), torch.empty((1, HEADS, 512, DIM), dtype=torch.int8)
    scale, zero = torch.zeros(2, 1, HEADS, 1, DIM)
    how, everything = ("bfloat16", HEADS, 0.1, out, torch.empty(1, HEADS * GROUP)), (records.data_ptr(), RECORD, TOKENS)

    def by_torch() -> None:
        kv = records.index_select(0, taken)
        torch.nn.functional.scaled_dot_product_attention(
            asked.to(torch.bfloat16).view(1, HEADS, GROUP, DIM),
            kv[None, :, 0].transpose(1, 2),
            kv[None, :, 1].transpose(1, 2),
        )

    plain, stored = torch.from_numpy(query), {bits: torch.from_numpy(part) for bits, part in coded.items()}
    core, moved, torch_too = CORE, CHOSEN * RECORD, ", torch"
    attend = [Row("attend to scattered tokens", moved, lambda: native.attend(asked, [where], *how), core)]
    attend.append(Row("attend to scattered tokens" + torch_too, moved, by_torch))
    attend.append(Row("attend to all tokens", records.nbytes, lambda: native.attend(asked, [everything], *how), core))
    rows = [Row(core, words.nbytes, lambda: native.read(words))]
    for bits in (8, 4):
        name, size = f"score int{bits}", coded[bits].nbytes
        rows.append(Row(name, size, lambda b=bits: native.score(query, coded[b], b), core))
        rows.append(Row(name + torch_too, size, lambda b=bits: products(plain, unpack(stored[b], b))))
    coarse = torch.from_numpy(rng.integers(-128, 128, (HEADS, TOKENS, DIM // 4), np.int8))
    spans = torch.from_numpy(rng.integers(-127, 128, (HEADS, TOKENS // SEGMENT, 2, DIM), np.int8)).sort(2).values
    rows.append(Row("score int2", coarse.nbytes, lambda: native.scan(plain, coarse, spans, SEGMENT, scores), core))
    rows.append(Row("score int2" + torch_too, coarse.nbytes, lambda: segment_scores_torch(plain, coarse, spans)))
    steps = np.full(HEADS * GROUP, 0.4, np.float32)
    rows.append(Row("top-k of all heads", scores.nbytes, lambda: topk(native.head_ranks(scores, steps), CHOSEN), core))
    held = torch.from_numpy(scores), torch.from_numpy(steps)
    reference = lambda: topk_reference(head_ranks_reference(*held), CHOSEN)  # noqa: E731
    rows.append(Row("top-k of all heads" + torch_too, scores.nbytes, reference))
    encode = Row("code 512 keys", keys.nbytes, lambda: native.encode(keys, 8, scale, zero, codes, 0), core)
    return [*rows, *attend, encode]


def drive_rows(rng: np.random.Generator, folder: Path) -> tuple[list[Row], Callable[[], None]]:
    """Rows of the drive: scattered tokens of one layer, and as many sequential bytes; tokens change with each turn."""
    engines = ["threads"] if ring.why_not() else ["io_uring", "threads"]
    rows, files = [], []
    part = rng.integers(0, 255, (TOKENS, RECORD), np.uint8)
    choices = [np.sort(rng.choice(TOKENS, CHOSEN, replace=False)) for _ in range(16)]
    for engine in engines:
        file = RecordFile(folder, RECORD, 4, engine=engine)
        files.append(file)
        for layer in range(4):
            file.write(layer, 0, part)
        turns = {"stream": 0, "fetch": 0}
        buffer = aligned(CHOSEN * RECORD // MAX_READ * MAX_READ)

        def stream(file=file, buffer=buffer, turns=turns) -> None:
            turns["stream"] += 1
            base = turns["stream"] % 4 * TOKENS * RECORD
            jobs = [(base + at, buffer[at : at + MAX_READ]) for at in range(0, len(buffer), MAX_READ)]
            file.transfer("read", jobs, 0, 0)

        def fetch(file=file, turns=turns) -> None:
            turns["fetch"] += 1
            file.read_in_place(turns["fetch"] % 4, choices[turns["fetch"] % 16])

        how = engine + ("" if file.direct else ", page cache")
        bound = f"stream 1 MiB, {engines[0]}" if file.direct else None
        rows.append(Row(f"stream 1 MiB, {how}", len(buffer), stream))
        rows.append(Row(f"fetch tokens, {how}", CHOSEN * RECORD, fetch, bound))

    def close() -> None:
        for file in files:
            file.close()

    return rows, close


def seam(system: str, n: int, steps: int = 200) -> dict:
    """Overhead of one layer's append and attend beyond the kernels they call, in microseconds.

    The embedded model's shape, one thread; medians of the total and of each kernel.
    """
    heads, group, dim = 4, 2, 64
    layer = Layer(0, POLICIES[system](), Run(Settings(alpha=ALPHA), 1))
    layer.append(*torch.randn(2, 1, heads, n, dim))
    whole, kernels, names = [], [], ("encode", "quantise_query", "score", "head_ranks", "topk", "attend")
    real, spent = {name: getattr(native, name) for name in names}, [0]

    def timed(call: Callable) -> Callable:
        def inner(*args, **kwargs):
            start = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter_ns() - start

        return inner

    for step in range(2 * steps + 20):
        keys, values, query = (torch.randn(1, count, 1, dim) for count in (heads, heads, heads * group))
        watched, spent[0] = step % 2, 0
        for name in names:
            setattr(native, name, timed(real[name]) if watched else real[name])
        start = time.perf_counter_ns()
        layer.append(keys, values)
        layer.attend(query, None, 0.125)
        took = time.perf_counter_ns() - start
        if step >= 20:
            (kernels if watched else whole).append((spent[0] if watched else took) / 1e3)
    for name in names:
        setattr(native, name, real[name])
    total, inside = statistics.median(whole), statistics.median(kernels)
    return {"system": system, "tokens": n, "us": total, "kernels_us": inside, "beyond_us": total - inside}


def measure(folder: Path, repeats: int = 9) -> dict:
    """All rows, with the facts of the run."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows, close = memory_rows(rng), lambda: None
    try:
        more, close = drive_rows(rng, folder)
        rows += more
        for turn in range(repeats + 1):
            for row in rows if turn % 2 else rows[::-1]:
                row.once()
        for row in rows:  # drop the first turn, which touches the buffers for the first time
            del row.seconds[0], row.cpu[0]
    finally:
        close()
    by_name = {row.name: row for row in rows}
    with torch.inference_mode():
        seams = [seam(system, n) for system in ("full", "topk") for n in (128, 2048)]
    return {"facts": facts(repeats), "rows": [result_of(row, by_name) for row in rows], "seam": seams}


def result_of(row: Row, rows: dict[str, Row]) -> dict:
    result = {"name": row.name, "bytes": row.nbytes, "ms": row.ms, "gbps": row.nbytes / row.ms / 1e6}
    result |= {"ms_min": 1e3 * min(row.seconds), "ms_max": 1e3 * max(row.seconds)}
    result["cpu_ms"] = 1e3 * statistics.median(row.cpu)
    if row.bound in rows:  # paired by turn, so both saw the same noise; CPU time for a core
        bound, what = rows[row.bound], "cpu" if row.bound == CORE else "seconds"
        pairs = zip(getattr(bound, what), getattr(row, what), strict=True)
        result["of_bound"] = statistics.median(row.nbytes / bound.nbytes * one / ours for one, ours in pairs)
        result["bound"] = row.bound
    for plain in (f"{row.name}, torch", row.name.replace("io_uring", "threads")):
        if plain in rows and plain != row.name:
            pairs = zip(rows[plain].seconds, row.seconds, strict=True)
            result["speedup"] = statistics.median(one / ours for one, ours in pairs)
    return result


def facts(repeats: int) -> dict:
    return {
        "machine": machine(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "isa": native.isa(),
        "io_uring": ring.why_not() or "yes",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "shape": f"{TOKENS} tokens, {HEADS} KV heads, group {GROUP}, head_dim {DIM}, bf16, {CHOSEN} chosen",
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def show(result: dict) -> None:
    for name, value in result["facts"].items():
        print(f"{name}: {value}")
    print(f"\n{'':36}{'ms':>9}{'min':>9}{'max':>9}{'GB/s':>7}{'of bound':>10}{'vs plain':>10}{'CPU ms':>9}")
    for row in result["rows"]:
        bound = f"{row['of_bound']:.0%}" if "of_bound" in row else ""
        plain = f"{row['speedup']:.1f}x" if "speedup" in row else ""
        print(f"{row['name']:36}{row['ms']:9.3f}{row['ms_min']:9.3f}{row['ms_max']:9.3f}{row['gbps']:7.1f}", end="")
        print(f"{bound:>10}{plain:>10}{row['cpu_ms']:9.2f}")
    print("\none layer's append and attend, microseconds:")
    for row in result["seam"]:
        print(f"{row['system']:>8} {row['tokens']:6} tokens: {row['us']:6.0f}", end="")
        print(f", of which kernels {row['kernels_us']:5.0f}, beyond them {row['beyond_us']:5.0f}")


def keep(path: Path | None, result: dict) -> None:
    """Write the result to `path`, if given, for `benchmarks.compare`."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the result here as JSON, for benchmarks.compare")
    parser.add_argument("--drive", type=Path, help="folder on the drive to benchmark (0.5 GiB per engine)")
    parser.add_argument("--repeats", type=int, default=9)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.drive) as folder:
        result = measure(Path(folder), words.repeats)
    show(result)
    keep(words.out, result)


if __name__ == "__main__":
    main()
