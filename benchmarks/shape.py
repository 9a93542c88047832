"""Systems side by side on a large model's KV cache: python -m benchmarks.shape [--shape 8B|1B] [--tokens 32768]

A cache of that model's shape is filled and asked for attention through the same calls that transformers makes
(`TieredCache.update`, the registered attention function, the guess for the next layer), without the model around it:
what is timed is all that a cache does in a decode step, and none of the projections and MLPs, which on a CPU would
take longer than that and are the same for every system.

Keys are made so that scores select what the embedded model's steps were recorded to select (benchmarks/trace.py):
channel s of a key is large where step s selected the token, the step's query looks along channel s, and the guess for
it along a channel of the recorded guess. So scoring, search, pool and reads are the systems' own, on selections with
the recorded runs, overlap and guesses. Values are random. The drive is read with O_DIRECT.
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.micro import facts, keep
from benchmarks.trace import Trace, record
from hillinfer import native
from hillinfer.cache import attention
from hillinfer.systems import make_cache
from hillinfer.tiers.block_file import MAX_READ, BlockFile, aligned
from hillinfer.tiers.record_file import RecordFile

ALPHA, WARM, STEPS = 0.1, 20, 10
LOGIT = 10.0  # of a token that a step selected, over the others: no desert, no single winner
SYSTEMS = ("hillinfer", "flexgen", "leoam", "dualblade")
EQUAL = ", equal memory"
TUNED = "hillinfer, int4, nothing pinned"
MEMORY_LAYERS = 8  # of 32, where all KV is in memory several times
PIECES = 2000  # small reads that the drive is measured with in each turn


@dataclass(frozen=True)
class Shape:
    """Of a model's KV cache, in bf16."""

    name: str
    layers: int
    heads: int  # KV heads
    group: int
    dim: int

    @property
    def token_bytes(self) -> int:
        return 4 * self.layers * self.heads * self.dim

    def config(self) -> LlamaConfig:
        heads = self.heads * self.group
        return LlamaConfig(
            hidden_size=heads * self.dim,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=self.heads,
            head_dim=self.dim,
        )


SHAPES = {
    "8B": Shape("8B", 32, 8, 4, 128),  # Llama 3 8B
    "1B": Shape("1B", 16, 8, 4, 64),  # Llama 3.2 1B
    "tiny": Shape("tiny", 3, 2, 2, 64),  # for tests
}


class Field:
    """Keys, values and queries of n tokens whose scores follow a trace."""

    def __init__(self, shape: Shape, trace: Trace, n: int, steps: int = WARM + STEPS, device: str = "cpu"):
        if 2 * steps > shape.dim:
            raise ValueError(f"{steps} steps need two channels each, but a head has {shape.dim}")
        self.shape, self.n, self.steps, self.trace, self.device = shape, n, steps, trace, device
        self.random = torch.Generator().manual_seed(1)
        self.keys = [self._keys(layer) for layer in range(min(trace.layers, shape.layers))]
        self.values = torch.empty(1, shape.heads, n, shape.dim, dtype=torch.bfloat16).normal_(generator=self.random)

    def _keys(self, layer: int) -> torch.Tensor:
        """(1, Hkv, n, D) bf16: of the tokens that a step selected those lead that the steps select most often; of a
        guess, those that were the surest.
        """
        shape, marks = self.shape, torch.zeros(3, self.steps, self.n)
        for step in range(self.steps):
            for kind, row in (("true", 0), ("guess", 1), ("sure", 2))[: 3 if layer else 1]:
                marks[row, step, torch.from_numpy(self.trace.positions(self.n, layer, step + 1, kind)).long()] = 1
        often = marks[0].mean(0)
        chosen = torch.stack((marks[0] * (1 + often), marks[1] * (1 + 0.5 * often) + 0.5 * marks[2])) / 2
        channels = (chosen + 0.2 * often).flatten(0, 1).T  # (n, 2 * steps)
        keys = torch.empty(1, shape.heads, self.n, shape.dim).normal_(0, 0.02, generator=self.random)
        keys[..., : 2 * self.steps] += channels
        return keys.to(torch.bfloat16)

    def query(self, step: int, guess: bool = False) -> torch.Tensor:
        """(1, H, 1, D) bf16."""
        heads = self.shape.heads * self.shape.group
        query = torch.empty(1, heads, 1, self.shape.dim).normal_(0, 0.01, generator=self.random)
        query[..., step + self.steps * guess] = 1
        return (query * 2 * LOGIT * self.shape.dim**0.5).to(self.device, torch.bfloat16)

    def new(self) -> torch.Tensor:
        """Key and value of one more token, (2, 1, Hkv, 1, D)."""
        made = torch.empty(2, 1, self.shape.heads, 1, self.shape.dim).normal_(0, 0.02, generator=self.random)
        return made.to(self.device, torch.bfloat16)


@dataclass
class Stack:
    """One system's cache of a field's tokens, and what each of its steps took."""

    name: str
    field: Field
    system: str
    options: dict
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    lanes: list[dict] = field(default_factory=list)  # "lane kind" -> bytes
    reads: list[int] = field(default_factory=list)  # requests to the drive

    def open(self) -> None:
        shape, start = self.field.shape, time.perf_counter()
        self.cache = make_cache(shape.config(), self.system, **self.options)
        self.layers = [tiered.layer for tiered in self.cache.layers]
        for index, layer in enumerate(self.layers):
            keys = self.field.keys[self.field.trace.layer(index)]
            layer.append(keys.to(self.field.device), self.field.values.to(self.field.device))
        for layer in self.layers:  # so that no write is left to disturb the reads
            run, parts = layer.run, getattr(layer.store, "streams", [])
            for part in [*parts, *(run.tensors.pair(layer.index) if run.tensors else [])]:
                part.settle()
        for path in run.tensors.paths.values() if run.tensors else []:
            if isinstance(path, BlockFile):
                os.fdatasync(path.fd)
        self.filled, self.module = time.perf_counter() - start, torch.nn.Module()

    def step(self, number: int) -> None:
        """One decode step of all layers, as a model would ask for it."""
        made, timeline, run = self.field.new(), self.cache.timeline, self.cache.run
        query, guess = self.field.query(number), self.field.query(number, guess=True)
        scaling, last = self.field.shape.dim**-0.5, len(timeline.spans)
        asked = getattr(run.drive, "reads", 0)
        before, start = time.process_time(), time.perf_counter()
        for index in range(len(self.layers)):
            if index + 1 < len(self.layers) and self.layers[index + 1].looks_ahead:
                self.layers[index + 1].speculate(guess, None, scaling)
            keys, values = self.cache.update(made[0], made[1], index)
            attention(self.module, query, keys, values, None, scaling)
        if self.field.device != "cpu":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - before)
        self.reads.append(getattr(run.drive, "reads", 0) - asked)
        lanes = {}
        for span in timeline.spans[last:]:
            lanes[f"{span.lane} {span.kind}"] = lanes.get(f"{span.lane} {span.kind}", 0) + span.bytes
        self.lanes.append(lanes)
        if run.tensors:  # what it fetches ahead for the next step must not disturb the others' turns
            wait([future for slot in run.tensors.slots.slots for future in slot.loading])

    def held(self) -> int:
        """Bytes of KV, codes and index in memory."""
        return sum(size for kind, size in self.cache.memory().items() if kind != "drive")

    @property
    def selects(self) -> bool:
        return self.layers[0].policy.selects

    def close(self) -> None:
        self.cache.close()

    def pool(self, steps: int) -> tuple[float, float]:
        """Shares over the last steps: hits of the pool, and of what the drive had to bring, what was there in time."""
        rows = self.cache.counters.rows[-steps * len(self.layers) :]
        far, guessed = sum(row.host + row.drive for row in rows), sum(row.drive for row in rows)
        found, early = sum(row.host for row in rows), sum(row.prefetched for row in rows)
        return found / far if far else 0.0, early / guessed if guessed else 0.0

    def codes(self) -> int:
        """Bytes of its key codes, which no budget counts."""
        shape, bits = self.field.shape, int(self.options.get("precision", "int8").removeprefix("int"))
        counted = self.system != "hillinfer"
        return 0 if counted else shape.layers * shape.heads * shape.dim * self.field.n * bits // 8

    def row(self, steps: int) -> dict:
        """Medians over the last steps."""
        ms, drive = sorted(1e3 * s for s in self.seconds[-steps:]), ("drive read", "drive prefetch", "drive abstract")
        low, _, high = statistics.quantiles(ms, n=4)
        lanes = self.lanes[-steps:]
        kinds = sorted(set().union(*lanes))
        mean = {kind: statistics.mean(lane.get(kind, 0) for lane in lanes) for kind in kinds}
        hits, guessed = self.pool(steps)
        return {
            "system": self.name,
            "ms": statistics.median(ms),
            "ms_low": low,
            "ms_high": high,
            "cpu_ms": 1e3 * statistics.median(self.cpu[-steps:]),
            "drive_mb": sum(mean.get(kind, 0) for kind in drive) / 1e6,
            "scored_mb": mean.get("cpu score", 0) / 1e6,
            "attended_mb": mean.get("cpu attend", 0) / 1e6,
            "reads": statistics.mean(self.reads[-steps:]),
            "pool_hits": hits,
            "guessed_right": guessed,
            "kv_memory_mb": self.held() / 1e6,
            "fill_s": self.filled,
        }


class Ordinary(Stack):
    """transformers' own `DynamicCache` and SDPA."""

    selects = False

    def open(self) -> None:
        shape, start = self.field.shape, time.perf_counter()
        self.cache, self.module = DynamicCache(), torch.nn.Module()
        self.module.num_key_value_groups, self.module.is_causal = shape.group, True  # what it asks of a model's layer
        for index in range(shape.layers):
            keys = self.field.keys[self.field.trace.layer(index)]
            self.cache.update(keys.to(self.field.device), self.field.values.to(self.field.device), index)
        self.filled = time.perf_counter() - start

    def step(self, number: int) -> None:
        made, query, scaling = self.field.new(), self.field.query(number), self.field.shape.dim**-0.5
        before, start = time.process_time(), time.perf_counter()
        for index in range(self.field.shape.layers):
            keys, values = self.cache.update(made[0], made[1], index)
            sdpa_attention_forward(self.module, query, keys, values, None, scaling=scaling)
        if self.field.device != "cpu":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - before)
        self.reads.append(0)
        moved = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        self.lanes.append({"cpu attend": moved})

    def pool(self, steps: int) -> tuple[float, float]:
        return 0.0, 0.0

    def held(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def close(self) -> None:
        self.cache = None


class Bounds:
    """What memory and drive give here, in bytes/s, measured between the steps of the systems.

    piece  bytes that the first system reads at once, on average: the drive is measured in such reads as well
    """

    size = 1 << 30  # bytes of the file
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
        """Bytes/s of memory and of the drive in reads of 1 MiB; seconds of a read of a piece, many at once. The best
        of all turns: a bound is what was shown to be possible, and what disturbs one turn loosens no bound.
        """
        return max(self.memory), max(self.drive), min(self.pieces)


def measure(field_: Field, ways: dict[str, tuple[str, dict]], folder: Path, steps: int = STEPS, tell=print) -> dict:
    """Systems taking turns, step by step: rows, and the bandwidths met between them. A way is a system and options."""
    bounds, stacks = Bounds(folder, torch.get_num_threads()), []
    try:
        for name, (system, options) in ways.items():
            kind = Ordinary if system == "DynamicCache" else Stack
            stack = kind(name, field_, system, {"drive": folder} | options)
            if options.get("host_budget") == "equal":  # what the first system holds in memory
                stack.options["host_budget"] = stacks[0].held() - stack.codes()
            stack.open()
            stacks.append(stack)
            warm = field_.steps - steps
            for step in range(0 if stack.selects else warm - 2, warm):
                stack.step(step)  # what always reads all is warm soon
            tell(f"{name}: filled in {stack.filled:.0f} s, last step before measuring {1e3 * stack.seconds[-1]:.0f} ms")
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
    """How much faster one system is than another: quartiles over the turns, the median in the middle."""
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
    """Systems at their defaults, where the streaming ones hold nothing; hillinfer with codes half the size and a pool
    ranked by hits alone; and others with the memory that the first one takes for its pool and its codes.
    """
    ways = {
        "hillinfer": ("hillinfer", {}),
        TUNED: ("hillinfer", {"precision": "int4", "pinned": 0.0}),
        f"{TUNED}{EQUAL}": ("hillinfer", {"precision": "int4", "pinned": 0.0, "host_budget": "equal"}),
        "flexgen": ("flexgen", {"host_budget": 0}),
        f"flexgen{EQUAL}": ("flexgen", {"host_budget": "equal"}),
        "leoam": ("leoam", {}),
        f"leoam{EQUAL}": ("leoam", {"host_budget": "equal"}),
        f"dualblade{EQUAL}": ("dualblade", {"host_budget": "equal"}),
    }
    return {name: (system, {"alpha": ALPHA} | own) for name, (system, own) in ways.items() if system in systems}


MEMORY_WAYS = {
    "topk": ("topk", {"alpha": ALPHA, "drive": None}),
    "topk, int4": ("topk", {"alpha": ALPHA, "drive": None, "precision": "int4"}),
    "full": ("full", {"drive": None}),
    "DynamicCache": ("DynamicCache", {}),
}


def in_memory(name: str, trace: Trace, tokens: int, folder: Path, steps: int = STEPS, tell=print) -> dict:
    """As `measure`, of systems that keep all KV in memory, and of a few layers: each layer costs the same."""
    shape = SHAPES[name]
    shape = replace(shape, layers=min(MEMORY_LAYERS, shape.layers))
    return measure(Field(shape, trace, tokens, WARM + steps), MEMORY_WAYS, folder, steps, tell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="hillinfer and whatever it is compared with")
    parser.add_argument("--memory", action="store_true", help="systems that keep all in memory, beside DynamicCache")
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to read from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trace", type=Path, default=Path("out/trace.npz"), help="recorded there where there is none")
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
