"""Fuzz the caches of every system: python -m benchmarks.fuzz_cache --sequences 3000 --seed 0

A sequence is a random system and shape, and random calls: prompts, turns and decode steps with padding, crops,
reorders, repeats, selections, resets, guesses, and calls with other shapes or types. `DynamicCache` gets the same, and
attention over both is compared; with alpha 1 every step, with less every step of several tokens. What `DynamicCache`
refuses must be a UsageError that changes nothing, as must what a drive cannot do. A failure prints the calls that led
to it, and `--only N` runs sequence N alone.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hillinfer.errors import UsageError
from hillinfer.systems.registry import make_cache

LAYERS, MOST, CALLS = 2, 60, 40  # most: tokens of a sequence
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
OPEN: set[str] = set()  # known faults, not tried until they are mended
MEMORY = "full streaming topk oracle random h2o snapkv quest infinigen leoam".split()  # without a drive
DRIVE = "full topk quest h2o infinigen lru hillinfer flexgen dualblade leoam instattention".split()
CHOICES = {  # of settings, where the system has them
    "alpha": [1.0, 1.0, 0.3],
    "recent": [1, 3, 16],
    "sinks": [0, 4],
    "lookahead": [True, False, 0.5, "auto"],
    "precision": ["int8", "int4", "int2"],
    "placement": ["hits", "shared-hits", "lru"],
    "pinned": [0.0, 0.0, 0.1, 0.3],
    "engine": ["auto", "threads"],
    "pipelining": ["auto", "intra", "cross"],
    "checksums": [True, False],
    "io_threads": [2],
}


class Wrong(Exception):
    """The cache differs from the reference."""


class Sequence:
    """One cache and its reference, and the calls that both get. `log` repeats them."""

    def __init__(self, seed: int, number: int, folder: Path):
        self.rng, self.draws = random.Random(f"{seed} {number}"), torch.Generator().manual_seed(seed * 2**24 + number)
        rng, self.log, self.refused = self.rng, [], 0
        on_drive = rng.random() < 0.5
        system = rng.choice(DRIVE if on_drive else MEMORY)
        options = {name: rng.choice(values) for name, values in CHOICES.items()}
        if system == "lru":
            del options["placement"]
        options["compress"] = 0.0
        if on_drive:
            options["drive"] = folder
            if system in ("full", "topk", "quest", "hillinfer") and rng.random() < 0.4:
                options |= {"drive_kind": "emulated", "precision": rng.choice(["int8", "int4"])}  # all that it scores
            elif system in ("full", "topk", "leoam"):
                options["compress"] = rng.choice([0.0, 0.0, 0.5, "auto"])
        if system in ("flexgen", "dualblade"):
            options["host_budget"] = rng.choice([None, 0, 20_000])
        elif on_drive and rng.random() < 0.3:
            options["host_budget"] = 10**6
        self.alpha = options["alpha"] if system not in ("full", "flexgen", "dualblade", "instattention") else 1.0
        self.exact = not options["compress"]  # INT4 records are lossy
        self.kv_heads, self.group = rng.choice([(2, 2), (1, 4), (2, 1)])
        self.dim, self.dtype = rng.choice([8, 16, 18]), rng.choice([*TOLERANCE, torch.float32])
        self.wide = rng.choice([self.dim, self.dim, 8 if "wide" in OPEN else 12])  # channels of a value
        heads = self.kv_heads * self.group
        self.config = LlamaConfig(
            num_hidden_layers=LAYERS, hidden_size=heads * self.dim, head_dim=self.dim, num_attention_heads=heads,
            num_key_value_heads=self.kv_heads, intermediate_size=8, vocab_size=9, attn_implementation="sdpa",
        )  # fmt: skip
        self.log.append(
            f"{system} {options}, {self.kv_heads} x {self.group} heads of {self.dim}, {self.wide}, {self.dtype}"
        )
        self.cache, self.reference = make_cache(self.config, system, **options), DynamicCache(config=self.config)
        self.module = SimpleNamespace(num_key_value_groups=self.group, training=False, is_causal=True)
        self.on_drive, self.padding = on_drive, None

    @property
    def n(self) -> int:
        return self.reference.get_seq_length()

    def run(self, calls: int) -> int:
        """Make so many calls; returns how many. Wrong, or whatever else a cache raises that is no UsageError."""
        kinds = {
            self.prompt: 3, self.steps: 6, self.crop: 2, self.reset: 0.5, self.reorder: 1, self.repeat: 0.5,
            self.choose: 0.7, self.mistake: 3,
        }  # fmt: skip
        for _ in range(calls):
            self.rng.choices(list(kinds), kinds.values())[0]()
            for layer, other in zip(self.cache.layers, self.reference.layers, strict=True):
                if layer.get_seq_length() != other.get_seq_length():
                    raise Wrong(f"{layer.get_seq_length()} tokens, not {other.get_seq_length()}")
                if self.n and tuple(layer.get_mask_sizes(3)) != tuple(other.get_mask_sizes(3)):
                    raise Wrong("other mask sizes")
        return calls

    def prompt(self) -> None:
        self._pass(self.rng.randint(2, 20))

    def steps(self) -> None:
        for _ in range(self.rng.randint(1, 4)):
            self._pass(1)

    def crop(self) -> None:
        n = self.rng.randint(0, self.n + 2 * ("beyond" not in OPEN))
        if n < self.n and self.rng.random() < 0.2:  # the older form names the tokens to keep
            self.log.append(f"crop({self.n - n})")
            self.cache.crop(self.n - n)
            self.reference.crop(-n)
        else:
            self._both(f"crop(-{n})", lambda cache: cache.crop(-n))

    def reset(self) -> None:
        self._both("reset()", lambda cache: cache.reset())

    def reorder(self) -> None:
        rows = self._rows(self._batch() if self.rng.random() < 0.8 else self.rng.randint(1, 3))
        self._both(f"reorder_cache({rows})", lambda cache: cache.reorder_cache(torch.tensor(rows)), rows)

    def repeat(self) -> None:
        times = self.rng.randint(1, 2)
        rows = [row for row in range(self._batch()) for _ in range(times)]
        self._both(f"batch_repeat_interleave({times})", lambda cache: cache.batch_repeat_interleave(times), rows)

    def choose(self) -> None:
        rows = self._rows(self.rng.randint(1, 3))
        if self.rng.random() < 0.2 and "rows" not in OPEN:  # as a mask, or counted from the end
            rows = [True] * self._batch() if self.rng.random() < 0.5 else [-1]
        self._both(f"batch_select_indices({rows})", lambda cache: cache.batch_select_indices(torch.tensor(rows)), rows)

    def mistake(self) -> None:
        """Keys that do not fit, into one layer after the others took theirs; then those that do."""
        batch, rng = self._batch(), self.rng
        if not self.n:
            return
        m, heads, dim, dtype = rng.choice([1, 4]), self.kv_heads, self.dim, self.dtype
        shapes = {
            "batch": [(batch + 1, heads, m, dim)] * 2,
            "heads": [(batch, heads + 1, m, dim)] * 2,
            "head_dim": [(batch, heads, m, dim + 2)] * 2,
            "values": [(batch, heads, m, dim), (batch, heads, m + 1, dim)],
            "rank": [(batch, heads, m)] * 2,
            "dtype": [(batch, heads, m, dim)] * 2,
        }
        kind = rng.choice([kind for kind in shapes if kind not in OPEN])
        if kind == "dtype":
            dtype = rng.choice([kind for kind in TOLERANCE if kind != dtype])

        def bad(index: int) -> None:
            self.log.append(f"  layer {index} gets a wrong {kind}, of {m} tokens")
            before = self.cache.layers[index].get_seq_length()
            try:
                self.cache.layers[index].update(*(self._draw(*shape).to(dtype) for shape in shapes[kind]))
            except UsageError:
                self.refused += 1
            else:
                raise Wrong(f"a wrong {kind} was taken")
            if self.cache.layers[index].get_seq_length() != before:
                raise Wrong(f"a wrong {kind} left tokens behind")

        self._pass(rng.choice([1, m]), {rng.randrange(LAYERS): bad})

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.draws).to(self.dtype)

    def _batch(self) -> int:
        return 1 if self.padding is None else len(self.padding)

    def _rows(self, count: int) -> list[int]:
        """Sequences of the batch, seldom one that there is not."""
        batch = self._batch()
        slip = "rows" not in OPEN and self.rng.random() < 0.1
        return [self.rng.randrange(batch + slip) for _ in range(count)]

    def _both(self, text: str, call: Callable, rows: list | None = None) -> None:
        """A call to both. What the reference refuses must be refused; a drive may refuse to move sequences (rows)."""
        if rows is not None and not self.n and "rows" in OPEN:
            return
        self.log.append(text)
        kept = [(layer.keys, layer.values) for layer in self.reference.layers if self.n]
        try:
            call(self.reference)
            right = True
        except (IndexError, RuntimeError, ValueError):
            right = False
        try:
            call(self.cache)
        except UsageError as error:
            self.refused += 1
            if right and not (self.on_drive and rows is not None):
                raise Wrong(f"refused: {error}") from error
            for layer, (keys, values) in zip(self.reference.layers, kept, strict=False):
                layer.keys, layer.values = keys, values
            return
        if not right:
            raise Wrong("the reference refuses this")
        if rows is not None and kept:
            self.padding = self.padding[torch.tensor(rows)]

    def _pass(self, m: int, before: dict[int, Callable] | None = None) -> None:
        """m tokens through all layers of both: append, attend, compare."""
        rng, past = self.rng, self.n
        if past + m > MOST:
            return
        if not self.reference.layers[0].is_initialized:
            self.padding = torch.tensor(
                [rng.choice([0, 0, rng.randint(0, 9)]) for _ in range(rng.choice([1, 1, 2, 3]))]
            )
        batch, heads = len(self.padding), self.kv_heads * self.group
        self.log.append(f"{m} tokens to {past}, padded by {self.padding.tolist()}")
        at = torch.arange(past + m)
        seen = (at >= self.padding[:, None, None]) & (at <= at[past:, None])  # (B, q, N)
        seen |= at == at[past:, None]  # else a padded query would see nothing
        mask = None if m == 1 and not self.padding.any() and rng.random() < 0.5 else seen[:, None]
        if mask is not None and rng.random() < 0.3:
            mask = torch.zeros(mask.shape, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        for index in range(LAYERS):
            if before and index in before:
                before[index](index)
            keys, values = (self._draw(batch, self.kv_heads, m, dim) for dim in (self.dim, self.wide))
            query, scaling = self._draw(batch, heads, m, self.dim), self.dim**-0.5
            with torch.inference_mode(rng.random() < 0.7):
                own, want = (
                    attend(self.module, query, *cache.update(keys, values, index), mask, scaling=scaling)[0]
                    for cache in (self.cache, self.reference)
                )
                self._guess(index + 1, query, mask, m)
            gap = (own - want).abs().max() if own.shape == want.shape else torch.inf
            most = TOLERANCE[self.dtype] if self.exact else 1.0
            if not own.isfinite().all() or ((m > 1 or self.alpha == 1) and not gap <= most):
                raise Wrong(f"layer {index}, {m} tokens to {past}: {own.shape}, off by {gap:.2g}")

    def _guess(self, index: int, query: torch.Tensor, mask: torch.Tensor | None, m: int) -> None:
        """As `TieredCache.attach` does, before the next layer's keys come."""
        if m == 1 and index < LAYERS and (layer := self.cache.layers[index].layer).looks_ahead:
            layer.speculate(query, mask, self.dim**-0.5)


def run(
    sequences: range, seed: int, folder: Path, calls: int = CALLS, report: Callable[[str], None] = print
) -> tuple[Counter, list[str]]:
    """Run the sequences. Returns the calls made, the refused ones among them, and a text for each failure."""
    done, failures = Counter(), []
    for number in sequences:
        sequence = Sequence(seed, number, folder)
        try:
            with sequence.cache:
                done["calls"] += sequence.run(sequence.rng.randint(min(5, calls), 2 * calls))
        except Exception as error:
            where = "" if isinstance(error, Wrong) else traceback.format_exc()
            failures.append("\n".join((f"--seed {seed} --only {number}: {error!r}", *sequence.log, where)))
            report(failures[-1])
        done["refused"] += sequence.refused
        if left := list(folder.iterdir()):
            failures.append(f"--seed {seed} --only {number} left {left[0].name}")
            report(failures[-1])
        if len(failures) >= 20:
            break
    return done, failures


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--sequences", type=int, default=3000)
    words.add_argument("--calls", type=int, default=CALLS, help="of a sequence, in the mean")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--only", type=int, help="this sequence alone")
    words.add_argument("--drive", type=Path, help="folder for the drives' files")
    args, start = words.parse_args(), time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    chosen = range(args.sequences) if args.only is None else range(args.only, args.only + 1)
    with tempfile.TemporaryDirectory(dir=args.drive) as folder:
        done, failures = run(chosen, args.seed, Path(folder), args.calls)
    took = time.perf_counter() - start
    print(f"{done['calls']:,} calls, {done['refused']:,} refused, {len(failures)} failures, {took:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
