"""What a policy is given, and what it must answer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Step:
    """One decode step of one layer and sequence, as a policy sees it."""

    n: int  # cached tokens, the newest included
    budget: int  # how many of them may be attended to; not fewer than sinks and recent tokens
    sinks: int  # first tokens kept on the device
    recent: int  # last tokens kept on the device
    layer: int
    step: int
    scores: Callable[[], np.ndarray]  # INT8 scores of all keys, (Hkv, n) int32; padding has the lowest. Costs a scan
    weights: Callable[[], np.ndarray]  # exact attention weights (H, n) float32. Reads all KV: for study, not for speed
    query: torch.Tensor | None = None  # (H, D), of this layer and sequence
    scaling: float = 1.0  # of the logits
    row: int = 0  # the sequence of the batch
    valid: np.ndarray | None = None  # (n,) bool, False for padding; None where there is none
    guess: bool = False  # the query is a prediction: answer, but learn nothing from it
    notes: dict = field(default_factory=dict)  # what the policy counts; the timeline keeps it with the selection

    @property
    def first(self) -> int:
        """The first token that is no padding (on the left, where `generate` pads)."""
        return 0 if self.valid is None else int(np.argmax(self.valid))

    def grouped(self, kv_heads: int) -> torch.Tensor:
        """The query as (Hkv, G, D) float32 on the host."""
        return self.query.to("cpu", torch.float32).view(kv_heads, -1, self.query.shape[-1])

    def near(self) -> np.ndarray:
        """Positions that the device holds: sinks and recent tokens. They cost no transfer."""
        return np.unique(
            np.concatenate((np.arange(min(self.sinks, self.n)), np.arange(max(0, self.n - self.recent), self.n)))
        )


class Policy:
    """Chooses which tokens a decode step attends to. Subclass, write `select`, add one line to `policies`.

    A layer has a policy of its own, for all sequences of the batch. One that needs more than scores keeps an index:
    it then takes part in `append`, `truncate` and `reorder`, and `nbytes` is what the index holds in memory.
    """

    selects = True  # False: every step attends to everything, and `select` is not asked
    needs_codes = True  # whether `scores` is used; without it no key codes are built
    can_speculate = False  # whether `select` may be called with a predicted query as well (see `Step.guess`)
    watches = False  # whether `observe` and `attended` are wanted; they cost as much as an attention
    late = True  # whether it may take over a cache that was filled without it (given all keys by one `append`)
    nbytes = 0

    def __init_subclass__(cls) -> None:
        cls.exact = not cls.selects  # it attends to every token

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        """The cache is empty; these are its shapes."""

    def append(self, keys: torch.Tensor) -> None:
        """New keys (B, Hkv, n, D) of every sequence, before any selection that may pick them."""

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None, scaling: float) -> None:
        """A pass of several tokens attended exactly: queries (B, H, q, D) of the newest of keys (B, Hkv, n, D)."""

    def attended(self, row: int, picked: np.ndarray, weights: np.ndarray) -> None:
        """A decode step of this sequence gave the picked tokens (k,) these attention weights (H, k)."""

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on."""

    def reorder(self, rows: torch.Tensor) -> None:
        """Take these sequences, in this order."""

    def select(self, step: Step) -> np.ndarray | None:
        """Sorted, distinct positions, at most `step.budget` of them; None attends to everything."""
        raise NotImplementedError
