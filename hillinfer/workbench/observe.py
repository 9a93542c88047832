"""What each layer and head attended to, aggregated to blocks of positions while the run goes on. Never T x T."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hillinfer.attention import attention_weights

SHARE = 0.9  # of a head's attention mass
KEEP = 64 << 20  # bytes


@dataclass(frozen=True)
class Seen:
    """One layer in one step of the first sequence. With `exact`, weights are over all cached tokens, else over the
    chosen ones.
    """

    n: int  # cached tokens
    block: int  # positions in a block
    mass: np.ndarray  # (H, blocks) float16, the share of each head's attention; a row sums to 1
    chosen: np.ndarray  # (blocks,) int32, how many of a block's tokens were attended to
    needed: np.ndarray  # (H,) float32, the fewest tokens that hold SHARE of the attention
    caught: np.ndarray | None  # (H,) float32, the share of the exact attention that fell on chosen tokens


class AttentionRecord:
    """The newest steps' `Seen`, by step and layer, in at most 64 MiB. Set `cache.run.observer` to one.

    blocks  the most blocks that positions are aggregated to
    exact   weigh all cached tokens, which reads all KV at every step: for study
    budget  share of the run's time that may go into looking; steps are then left out. None looks at every step
    """

    def __init__(self, blocks: int = 256, exact: bool = False, budget: float | None = None):
        self.blocks, self.exact, self.budget = blocks, exact, budget
        self.steps: dict[int, dict[int, Seen]] = {}  # complete or growing, oldest first
        self.left_out = 0  # steps that were not looked at, or are kept no longer
        self._on, self._bytes, self._step = False, 0, None
        self._began = self._at = self._spent = self._plain = self._took = 0  # ns

    def wants(self, layer: int, step: int) -> bool:
        """Whether this layer should be shown; decided once a step, when it is first asked."""
        if step != self._step:
            now = time.perf_counter_ns()
            self._began = self._began or now
            self._pay(now - self._at)
            self._step, self._at, self._took = step, now, 0
            self._on = self.budget is None or self._spent <= self.budget * (now - self._began)
            self.left_out += not self._on
        return self._on

    def _pay(self, took: int) -> None:
        """What the step before cost: what looking took, or what the step took more than those that nobody looked at,
        which cannot attend to records in place either.
        """
        if self._on:
            self._spent += max(self._took, took - self._plain if self._plain else 0)
        elif self._step is not None:
            self._plain = took if not self._plain else (7 * self._plain + took) // 8

    def take(
        self,
        layer: int,
        step: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        pick: np.ndarray | None,
        n: int,
        scaling: float,
        visible: torch.Tensor | None,
        everything: Callable[[], torch.Tensor],
    ) -> None:
        """query (H, D); keys (k, Hkv, D) of the positions `pick` (k,), or of all n; `everything` gives all n keys.

        visible (n,) bool hides padding.
        """
        start = time.perf_counter_ns()
        pick = np.arange(n) if pick is None else pick
        where = np.arange(n) if self.exact else pick
        shown = None if visible is None else visible[torch.from_numpy(where).to(visible.device)]
        weights = attention_weights(query, everything() if self.exact else keys[: len(pick)], scaling, shown)
        block = block_size(n, self.blocks)
        edges = np.searchsorted(where, np.arange(0, n, block))
        totals = np.concatenate((np.zeros((len(weights), 1)), weights.cumsum(1, dtype=np.float64)), 1)
        best = -np.sort(-weights, 1)
        seen = Seen(
            n,
            block,
            np.diff(totals[:, np.append(edges, len(where))], axis=1).astype(np.float16),
            np.bincount(pick // block, minlength=len(edges)).astype(np.int32),
            ((best.cumsum(1) < SHARE).sum(1) + 1).astype(np.float32),
            weights[:, pick].sum(1) if self.exact else None,
        )
        self.steps.setdefault(step, {})[layer] = seen
        self._bytes += seen.mass.nbytes + seen.chosen.nbytes
        while self._bytes > KEEP and len(self.steps) > 1:
            oldest = self.steps.pop(next(iter(self.steps)))
            self._bytes -= sum(part.mass.nbytes + part.chosen.nbytes for part in oldest.values())
            self.left_out += 1
        self._took += time.perf_counter_ns() - start

    def at(self, step: int | None = None) -> tuple[int, dict[int, Seen]] | None:
        """The nearest step at or before this one (the newest, by default) and its layers; None before the first."""
        held = list(self.steps.items())  # a copy: the run goes on in its own thread
        known = [one for one, layers in held if len(layers) == len(held[0][1])]  # the newest may still be growing
        if step is not None:
            known = [one for one in known if one <= step] or known[:1]
        found = self.steps.get(known[-1]) if known else None
        return None if found is None else (known[-1], dict(found))

    def needed(self, step: int | None = None) -> np.ndarray:
        """(layers, H): the share of the cached tokens that holds 90 % of each head's attention, mean over the steps, or
        in one.
        """
        steps = list(self.steps.values()) if step is None else [self.steps[step]]
        return np.mean([[s[layer].needed / s[layer].n for layer in sorted(s)] for s in steps], 0)


def block_size(n: int, blocks: int) -> int:
    """The smallest power of two that covers n positions with that many blocks: it stays while a text grows."""
    size = 1
    while size * blocks < n:
        size *= 2
    return size
