"""Systems side by side on a large model's KV cache: python -m benchmarks.shape [--shape 8B|1B] [--tokens 32768]

A cache of that model's shape is filled and queried with the calls that transformers makes (`TieredCache.update`, the
registered attention function, the lookahead for the next layer), but without the model. The times cover all work of the
cache in a decode step, and exclude projections and MLPs, which dominate on a CPU and are equal for every system.

benchmarks/stack.py generates the KV. The drive is read with O_DIRECT.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.micro import facts, keep
from benchmarks.stack import SHAPES, STEPS, WARM, Field, Ordinary, Stack
from benchmarks.trace import Trace, record
from hillinfer import native
from hillinfer.growable import aligned
from hillinfer.tiers.block_file import MAX_READ
from hillinfer.tiers.record_file import RecordFile

ALPHA = 0.1
SYSTEMS = ("hillinfer", "flexgen", "leoam", "dualblade")
EQUAL = ", equal memory"
TUNED = "hillinfer, int4"
MEMORY_LAYERS = 8  # of 32: the in-memory comparison keeps several copies of all KV
PIECES = 2000  # small reads per turn of the drive's bandwidth measurement


class Bounds:
    """Memory and drive bandwidth in bytes/s, measured between the systems' steps.

    piece  mean read size of the first system in bytes; the drive is also measured with reads of this size
    """

    size = 1 << 30  # file size in bytes
    piece = 4096

    def __init__(self, folder: Path, threads: int):
        self.words, self.threads = np.ones(self.size // 16, np.uint64), threads
        self.file, self.turn = RecordFile(folder, 4096, 1), 0
        self.file.write(0, 0, np.random.default_rng(0).integers(0, 255, (self.size >> 12, 4096), np.uint8))
        self.buffer = aligned(self.size // 8)
        self.memory, self.drive, self.pieces, self.random = [], [], [], np.random.default_rng(1)

    def once(self) -> None:
        start = time.perf_counter()
        native.read(self.words, self.threads)
        self.memory.append(self.words.nbytes / (time.perf_counter() - start))
        base = self.turn * len(self.buffer) % self.size
        jobs = [(base + at, self.buffer[at : at + MAX_READ]) for at in range(0, len(self.buffer), MAX_READ)]
        start = time.perf_counter()
        self.file.transfer("read", jobs, 0, 0)
        self.drive.append(len(self.buffer) / (time.perf_counter() - start))
        self.turn += 1
        places = np.sort(self.random.choice((self.size - self.piece) >> 12, PIECES, replace=False)) << 12
        into = range(0, len(self.buffer), self.piece)
        jobs = [(place, self.buffer[at : at + self.piece]) for place, at in zip(places.tolist(), into, strict=False)]
        start = time.perf_counter()
        self.file.transfer("read", jobs, 0, 0)
        self.pieces.append((time.perf_counter() - start) / len(jobs))

    def rates(self) -> tuple[float, float, float]:
        """Bytes/s of memory and of the drive with 1 MiB reads, and seconds per concurrent read of a piece.

        The best of all turns, because noise in a single turn must not loosen a bound.
        """
        return max(self.memory), max(self.drive), min(self.pieces)


def measure(field_: Field, ways: dict[str, tuple[str, dict]], folder: Path, steps: int = STEPS, report=print) -> dict:
    """Alternate systems step by step. Returns their rows and the bandwidths measured in between.

    `ways` maps a name to a system and its options.
    """
    bounds, stacks = Bounds(folder, torch.get_num_threads()), []
    try:
        for name, (system, options) in ways.items():
            kind = Ordinary if system == "DynamicCache" else Stack
            stack = kind(name, field_, system, {"drive": folder} | options)
            if options.get("host_budget") == "equal":  # as much memory as the first system uses
                stack.options["host_budget"] = stacks[0].held() - stack.codes()
                if system == "leoam":  # sizes its index cache by the expected length
                    stack.options["max_tokens"] = field_.n + field_.steps
            stack.open()
            stacks.append(stack)
            warm = field_.steps - steps
            for step in range(0 if stack.selects else warm - 2, warm):
                stack.step(step)  # systems that read everything warm up quickly
            report(f"{name}: filled in {stack.filled:.0f} s, last warm-up step {1e3 * stack.seconds[-1]:.0f} ms")
        if asked := stacks[0].reads[-1]:
            nbytes = sum(size for kind, size in stacks[0].lanes[-1].items() if kind.startswith("drive"))
            bounds.piece = max(1, round(nbytes / asked / 4096)) * 4096
        for turn in range(steps):
            bounds.once()
            for stack in stacks if turn % 2 else stacks[::-1]:
                stack.step(field_.steps - steps + turn)
        rows, (memory, drive, piece) = [stack.row(steps) for stack in stacks], bounds.rates()
    finally:
        bounds.file.close()
        for stack in stacks:
            stack.close()
    for row in rows:
        moved = {"memory": (row["scored_mb"] + row["attended_mb"]) * 1e6, "drive": row["drive_mb"] * 1e6}
        lanes = {"memory": 1e3 * moved["memory"] / memory, "drive": 1e3 * moved["drive"] / drive}
        longest = max(lanes, key=lanes.get)
        row |= {"longest_lane": longest, "bound_ms": lanes[longest], "over_bound": row["ms"] / lanes[longest]}
        row |= {f"{lane}_lane_ms": ms for lane, ms in lanes.items()}
        row |= {"reads_ms": 1e3 * piece * row["reads"]}
        row |= {"over_reads": row["ms"] / max(row["reads_ms"], lanes["memory"])}
    bands = {"memory_gbps": memory / 1e9, "drive_gbps": drive / 1e9, "piece": bounds.piece, "piece_us": 1e6 * piece}
    return {"rows": rows, "bandwidths": [bands], "seconds": {stack.name: stack.seconds[-steps:] for stack in stacks}}


def ratio(result: dict, slow: str, fast: str) -> tuple[float, float, float]:
    """Speed-up of `fast` over `slow`: lower quartile, median and upper quartile over the turns."""
    pairs = zip(result["seconds"][slow], result["seconds"][fast], strict=True)
    return tuple(statistics.quantiles([one / other for one, other in pairs], n=4))


def show(result: dict) -> None:
    bands = result["bandwidths"][0]
    print(f"memory {bands['memory_gbps']:.1f} GB/s, drive {bands['drive_gbps']:.2f} GB/s in reads of 1 MiB", end=", ")
    print(f"{bands['piece_us']:.1f} us a read of {bands['piece'] >> 10} KiB, many at once: at best. Medians:")
    print(f"{'':36}{'ms':>7} {'quartiles':>13}{'CPU ms':>8}", end="")
    print(f"{'drive MB':>9}{'reads':>7}{'memory MB':>10}{'hits':>6}{'guess':>6}{'KV MB':>7}{'bound':>7}")
    for row in result["rows"]:
        spread, moved = f"{row['ms_low']:.0f}-{row['ms_high']:.0f}", row["scored_mb"] + row["attended_mb"]
        print(f"{row['system']:36}{row['ms']:7.0f} {spread:>13}{row['cpu_ms']:8.0f}", end="")
        print(
            f"{row['drive_mb']:9.0f}{row['reads']:7.0f}{moved:10.0f}{row['pool_hits']:6.0%}{row['guessed_right']:6.0%}",
            end="",
        )
        print(
            f"{row['kv_memory_mb']:7.0f}{row['bound_ms']:7.0f} {row['longest_lane']}, {row['over_bound']:.2f}x", end=""
        )
        print(f"; reads alone {row['reads_ms']:.0f}, {row['over_reads']:.2f}x" if row["reads"] else "")


def ways_of(systems: tuple[str, ...] = SYSTEMS) -> dict[str, tuple[str, dict]]:
    """The compared configurations by name.

    All systems with default settings, where lossless systems keep nothing in memory; hillinfer with INT4 codes and a
    pool ranked by hits only; and the others with as much memory as the first one uses for pool and codes.
    """
    ways = {
        "hillinfer": ("hillinfer", {}),
        TUNED: ("hillinfer", {"precision": "int4"}),
        f"{TUNED}{EQUAL}": ("hillinfer", {"precision": "int4", "host_budget": "equal"}),
        "flexgen": ("flexgen", {"host_budget": 0}),
        f"flexgen{EQUAL}": ("flexgen", {"host_budget": "equal"}),
        "leoam": ("leoam", {}),
        f"leoam{EQUAL}": ("leoam", {"host_budget": "equal"}),
        f"dualblade{EQUAL}": ("dualblade", {"host_budget": "equal"}),
    }
    return {name: (system, {"alpha": ALPHA} | options) for name, (system, options) in ways.items() if system in systems}


MEMORY_WAYS = {
    "topk": ("topk", {"alpha": ALPHA, "drive": None}),
    "topk, int4": ("topk", {"alpha": ALPHA, "drive": None, "precision": "int4"}),
    "full": ("full", {"drive": None}),
    "DynamicCache": ("DynamicCache", {}),
}


def in_memory(name: str, trace: Trace, tokens: int, folder: Path, steps: int = STEPS, report=print) -> dict:
    """Like `measure`, for systems with all KV in memory. A few layers suffice, because all layers cost the same."""
    shape = SHAPES[name]
    shape = replace(shape, layers=min(MEMORY_LAYERS, shape.layers))
    return measure(Field(shape, trace, tokens, WARM + steps), MEMORY_WAYS, folder, steps, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="systems to compare, separated by commas")
    parser.add_argument("--memory", action="store_true", help="compare systems with all KV in memory with DynamicCache")
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to benchmark")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trace", type=Path, default=Path("out/trace.npz"), help="recorded trace; created if missing")
    parser.add_argument("--out", type=Path, help="write the result here as JSON, for benchmarks.compare")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    trace = record(words.trace)
    words.drive.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=words.drive) as folder:
        if words.memory:
            result = in_memory(words.shape, trace, words.tokens, Path(folder))
        else:
            field_ = Field(SHAPES[words.shape], trace, words.tokens)
            result = measure(field_, ways_of(tuple(words.systems.split(","))), Path(folder))
    result = {"facts": facts(STEPS) | {"shape": f"{words.shape}, {words.tokens} tokens, alpha {ALPHA}"}} | result
    show(result)
    keep(words.out, result)


if __name__ == "__main__":
    main()
