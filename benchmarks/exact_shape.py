"""Rounds of exact decoding at a large model's shape, without the model, beside the systems that they compete with.

Drafts are decode steps of a `Stack`; a verifying pass makes the calls of a forward pass of several tokens over all KV.
How many tokens are drafted and accepted is given: benchmarks.show_exact records it on a real model.
"""

import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.shape import ALPHA
from benchmarks.stack import Field, Stack
from hillinfer.models.seam import attention
from hillinfer.speculative import Pace

HOSTILE = 20  # rounds in which nothing is accepted


class Rounds(Stack):
    """A stack that drafts and verifies."""

    def draft(self) -> float:
        """Seconds of one decode step; the queries of a field's steps come round again."""
        self.step(len(self.seconds) % self.field.steps)
        return self.seconds[-1]

    def verify(self, tokens: int) -> float:
        """Seconds of one pass of so many tokens."""
        shape, number = self.field.shape, len(self.seconds) % self.field.steps
        keys, values = torch.cat([self.field.new() for _ in range(tokens)], 3)
        query = torch.cat([self.field.query(number) for _ in range(tokens)], 2)
        start = time.perf_counter()
        for index in range(shape.layers):
            layer, _ = self.cache.update(keys, values, index)
            attention(None, self.module, query, layer, layer, None, scaling=shape.dim**-0.5)
        return time.perf_counter() - start

    def round(self, drafted: int, accepted: int) -> tuple[float, float]:
        """Seconds of the drafts, and of the pass that verifies them; a token is fed twice where it would be alone."""
        held = self.layers[0].n
        drafts = sum(self.draft() for _ in range(drafted)) + self._crop(held)
        return drafts, self.verify(max(2, drafted + 1)) + self._crop(held + accepted + 1)

    def _crop(self, n: int) -> float:
        start = time.perf_counter()
        self.cache.crop(n)
        return time.perf_counter() - start


@contextmanager
def opened(field: Field, alphas: Sequence[float], folder: Path) -> Iterator[dict]:
    """Stacks by name: hillinfer at each alpha, `random`, and flexgen with as much memory as hillinfer at ALPHA."""
    ways = {alpha: ("hillinfer", {"alpha": alpha}) for alpha in dict.fromkeys((ALPHA, *alphas))}
    ways |= {"random": ("random", {"alpha": ALPHA}), "flexgen": ("flexgen", {})}
    stacks = {name: Rounds(str(name), field, system, {"drive": folder} | own) for name, (system, own) in ways.items()}
    try:
        for name, stack in stacks.items():
            if name == "flexgen":
                stack.options["host_budget"] = stacks[ALPHA].held()
            stack.open()
            print(f"{stack.system} {name}: filled in {stack.filled:.0f} s", flush=True)
            for _ in range(3 if name == "flexgen" else field.steps // 3):
                stack.draft()
        yield stacks
    finally:
        for stack in stacks.values():
            if hasattr(stack, "cache"):
                stack.close()


def costs(stack: Rounds, drafted: int = 16, turns: int = 3) -> tuple[float, float]:
    """Median seconds of a drafted token and of a verifying pass."""
    drafts, passes = zip(*(stack.round(drafted, 0) for _ in range(turns)), strict=True)
    return statistics.median(drafts) / drafted, statistics.median(passes)


def race(stacks: dict, alpha: float, rounds: Sequence[tuple[int, int]], turns: int) -> tuple[float, ...]:
    """Seconds per token, in turns: of exact decoding over some of these rounds, of hillinfer that nothing verifies, and
    of flexgen.
    """
    taken, tokens, others = 0.0, 0, {ALPHA: [], "flexgen": []}
    for drafted, accepted in rounds[:: max(1, len(rounds) // turns)][:turns]:
        taken, tokens = taken + sum(stacks[alpha].round(drafted, accepted)), tokens + accepted + 1
        for name, seconds in others.items():
            seconds += [stacks[name].draft(), stacks[name].draft()]
    return taken / tokens, *map(statistics.median, others.values())


def hostile(stacks: dict, rounds: int = HOSTILE) -> tuple[float, float]:
    """Seconds per token if no draft of `random` is ever accepted, and of flexgen."""
    pace, taken, other = Pace(), 0.0, []
    for number in range(rounds):
        drafted = pace.gamma
        drafts, pass_s = stacks["random"].round(drafted, 0)
        with warnings.catch_warnings(action="ignore"):
            pace.note(drafted, 0, drafts, pass_s)
        taken += drafts + pass_s
        if number % 4 == 0:
            other.append(stacks["flexgen"].draft())
    return taken / rounds, statistics.median(other)
