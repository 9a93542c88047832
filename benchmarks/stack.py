"""A KV cache of a large model's shape without the model, and the systems that decode over it.

Keys are constructed to reproduce the recorded selections of the embedded model (benchmarks/trace.py). Channel s of a
key is large if step s selected the token; the query of step s points along channel s, and its guess along a channel of
the recorded guess. Scoring, search, pool and reads are those of the real systems, on selections with the recorded
locality, overlap and guesses. Values are random.
"""

import os
import statistics
import time
from concurrent.futures import wait
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.trace import Trace
from hillinfer.longbench.runner import in_memory
from hillinfer.models.seam import attention
from hillinfer.systems.lossless.tensors import Tensors
from hillinfer.systems.registry import make_cache
from hillinfer.tiers.block_file import BlockFile

WARM, STEPS = 20, 10
LOGIT = 10.0  # logit margin of selected tokens: neither flat nor dominated by one token


@dataclass(frozen=True)
class Shape:
    """Shape of a model's KV cache in bf16."""

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
    """Keys, values and queries of n tokens whose scores reproduce a trace."""

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
        """Key and value of one new token, (2, 1, Hkv, 1, D)."""
        made = torch.empty(2, 1, self.shape.heads, 1, self.shape.dim).normal_(0, 0.02, generator=self.random)
        return made.to(self.device, torch.bfloat16)


@dataclass
class Stack:
    """One system's cache of a field's tokens, with the measurements of each step."""

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
            for log in getattr(layer.store, "logs", []):
                getattr(log, "flush", lambda: None)()  # a computational drive's log does not know when it writes
            for tensor in self.tensors.pair(layer.index) if self.tensors else []:
                tensor.settle()
        for path in self.tensors.paths.values() if self.tensors else []:
            if isinstance(path, BlockFile):
                os.fdatasync(path.fd)
        self.filled, self.module = time.perf_counter() - start, torch.nn.Module()

    def step(self, number: int) -> None:
        """One decode step over all layers, with the calls of a model."""
        made, timeline, run = self.field.new(), self.cache.timeline, self.cache.run
        query, guess = self.field.query(number), self.field.query(number, guess=True)
        scaling, last = self.field.shape.dim**-0.5, len(timeline.spans)
        asked = getattr(run.drive, "reads", 0)
        before, start = time.process_time(), time.perf_counter()
        for index in range(len(self.layers)):
            if index + 1 < len(self.layers) and self.layers[index + 1].looks_ahead:
                self.layers[index + 1].speculate(guess, None, scaling)
            keys, values = self.cache.update(made[0], made[1], index)
            attention(None, self.module, query, keys, values, None, scaling=scaling)
        if self.field.device != "cpu":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - before)
        self.reads.append(getattr(run.drive, "reads", 0) - asked)
        lanes = {}
        for span in timeline.spans[last:]:
            lanes[f"{span.lane} {span.kind}"] = lanes.get(f"{span.lane} {span.kind}", 0) + span.bytes
        self.lanes.append(lanes)
        if self.tensors:  # what it fetches ahead for the next step must not disturb the others' turns
            wait([future for slot in self.tensors.slots.slots.values() for future in slot.loading])

    @property
    def tensors(self) -> Tensors | None:
        """Of a system that streams."""
        return getattr(self.cache.run, "tensors", None)

    def held(self) -> int:
        """Bytes of KV, codes and index in memory."""
        return in_memory(self.cache.memory())

    @property
    def selects(self) -> bool:
        return self.layers[0].policy.selects

    def close(self) -> None:
        self.cache.close()

    def pool(self, steps: int) -> tuple[float, float]:
        """Shares over the last steps: pool hits, and prefetched tokens among those needed from the drive."""
        rows = self.cache.counters.rows[-steps * len(self.layers) :]
        far, guessed = sum(row.host + row.drive for row in rows), sum(row.drive for row in rows)
        found, early = sum(row.host for row in rows), sum(row.prefetched for row in rows)
        return found / far if far else 0.0, early / guessed if guessed else 0.0

    def codes(self) -> int:
        """Bytes of key codes, which host_budget does not include."""
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
    """transformers' `DynamicCache` with SDPA."""

    selects = False

    def open(self) -> None:
        shape, start = self.field.shape, time.perf_counter()
        self.cache, self.module = DynamicCache(), torch.nn.Module()
        self.module.num_key_value_groups, self.module.is_causal = (
            shape.group,
            True,
        )  # the layer interface that lookahead needs
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
