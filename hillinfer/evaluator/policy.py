"""The policy interface: a decode step in, the tokens to attend to out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from hillinfer.evaluator.topk import highest


@dataclass
class Step:
    """One decode step of one layer and sequence: the input of `Policy.select`. For `Policy.choose` it is of all
    sequences, in tensors: query (B, H, D), ranks int32 (B, n), valid bool (B, n); without weights.
    """

    n: int  # cached tokens, including the newest
    budget: int  # maximum number of selected tokens; at least sinks + recent
    sinks: int  # first tokens, kept in the window
    recent: int  # last tokens, kept in the window
    layer: int
    step: int
    scores: Callable[[], np.ndarray]  # ranks of all keys by their codes, int32 (n,), higher is better; scans all codes
    weights: Callable[[], np.ndarray]  # exact attention weights (H, n) float32; reads all KV: for studies only
    query: torch.Tensor | None = None  # (H, D), of this layer and sequence
    scaling: float = 1.0  # of the logits
    row: int = 0  # the sequence's index in the batch
    valid: np.ndarray | None = None  # (n,) bool, False for padding; None without padding
    guess: bool = False  # the query is a prediction: select, but do not update any state
    notes: dict = field(default_factory=dict)  # the policy's own counts, recorded with the selection's span

    @property
    def first(self) -> int:
        """The first token after the left padding."""
        return 0 if self.valid is None else int(np.argmax(self.valid))

    def grouped(self, kv_heads: int) -> torch.Tensor:
        """The query as (Hkv, G, D) float32 on the host."""
        return self.query.to("cpu", torch.float32).view(kv_heads, -1, self.query.shape[-1])

    def near(self) -> np.ndarray:
        """Positions of the window, sinks and recent tokens, which need no transfer."""
        return np.union1d(np.arange(min(self.sinks, self.n)), np.arange(max(0, self.n - self.recent), self.n))

    def best(self, ranks: torch.Tensor) -> torch.Tensor:
        """Positions (B, budget) of the window and of the highest ranks (B, n) beside it, ascending; without a wait."""
        batch, first, last = len(ranks), min(self.sinks, self.n), self.n - self.recent
        order = torch.arange(self.n, dtype=torch.int64, device=ranks.device).expand(batch, -1)
        chosen = first + highest(ranks[:, first:last], self.budget - first - self.recent).sort(1).values
        return torch.cat((order[:, :first], chosen, order[:, last:]), 1)

    def accepts(self, picked) -> bool:
        """Whether a selection is None, for all tokens, or sorted, distinct positions within the budget."""
        if not isinstance(picked, np.ndarray) or picked.ndim != 1:
            return picked is None
        inside = 0 < len(picked) <= self.budget and picked[0] >= 0 and picked[-1] < self.n
        return bool(inside and (picked[1:] > picked[:-1]).all())


def of_row(part, row: int, counts):
    """Of one sequence, what counts: of a tensor or array (B, k, ...), by bool (B, k) or None for all."""
    return part[row] if counts is None else part[row][counts[row]]


def each_row(positions: torch.Tensor, counts: torch.Tensor | None) -> list[np.ndarray]:
    """What `Policy.choose` returned, in host memory, as each sequence's positions (k,)."""
    positions, counts = (None if part is None else part.numpy() for part in (positions, counts))
    return [of_row(positions, row, counts) for row in range(len(positions))]


class Policy:
    """Selects the tokens that a decode step attends to. Subclass, write `select`, add one line to `policies`.

    Each layer has its own instance, for all sequences of the batch. A policy with an index also implements `append`,
    `truncate` and `reorder`, and `nbytes` is the size of the index in memory.

    In place of `select`, or beside it for KV in a GPU's memory, `choose(step)` is asked once for all sequences, in
    tensors. It returns positions int64 (B, k) and which of them count, bool (B, k) or None for all, ascending; or None
    for all tokens. Its index is on `device`, and it should not make the host wait for a GPU.
    """

    selects = True  # False: every step attends to all tokens, and `select` is never called
    needs_codes = True  # uses `Step.scores`; otherwise no key codes are built
    fills = False  # takes as many tokens as the budget allows: it is not asked where that is all
    per_head = False  # each KV head selects for itself where the KV is in memory: a row of the batch for each
    can_speculate = False  # `select` accepts a predicted query (see `Step.guess`)
    device = torch.device("cpu")  # of an index, if the policy has `choose`
    watches = False  # needs `observe` and `attended`, which cost as much as an attention
    late = True  # can take over a filled cache, with all keys in one `append`
    nbytes = 0

    def __init_subclass__(cls) -> None:
        cls.exact = not cls.selects  # attends to every token
        own = next(vars(kind) for kind in cls.__mro__ if not {"select", "choose"}.isdisjoint(vars(kind)))
        cls.here, cls.there = "select" in own, "choose" in own  # asked of what is in host memory, or on a GPU

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        """Start with an empty cache of this shape."""

    def append(self, keys: torch.Tensor) -> None:
        """Index new keys (B, Hkv, n, D), before the first selection that may include them."""

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None, scaling: float) -> None:
        """Exact attention of several tokens: queries (B, H, q, D) of the newest of keys (B, Hkv, n, D)."""

    def attended(self, picked: torch.Tensor, weights: torch.Tensor) -> None:
        """Attention weights (B, H, k) of the selected tokens (B, k) in a decode step; 0 for those that do not count."""

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on."""

    def reorder(self, rows: torch.Tensor) -> None:
        """Select these sequences of the batch, in this order."""

    def select(self, step: Step) -> np.ndarray | None:
        """Sorted, distinct positions, at most `step.budget` of them; None for all tokens."""
        raise NotImplementedError
