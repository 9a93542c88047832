"""Permanent eviction, shared by H2O and SnapKV: the set of live tokens, and attention weights of the prefill."""

from collections.abc import Iterator

import torch

from hillinfer.evaluator.boxes import sortable
from hillinfer.evaluator.policy import Policy, Step
from hillinfer.evaluator.topk import highest
from hillinfer.growable import Growable

BLOCK = 128  # queries per block of attention weights


class Eviction(Policy):
    """An evicted token is never selected again. Its record stays in the store, so that later turns prefill exactly."""

    needs_codes = False
    watches = True
    per_head = True
    late = False
    fresh = 0.0  # worth of a new token

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        self.alive = Growable((batch, 0), 1, torch.bool, self.device)
        self.worth = Growable((batch, 0), 1, torch.float32, self.device)

    def append(self, keys: torch.Tensor) -> None:
        for part, value in ((self.alive, True), (self.worth, self.fresh)):
            part.extend(keys.shape[2])
            part.view()[:, -keys.shape[2] :] = value

    def newest(self, budget: int) -> int:
        """How many of the newest live tokens are kept whatever their worth."""
        raise NotImplementedError

    def choose(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The newest tokens and those of highest worth within the budget; all others are evicted."""
        if step.budget >= step.n:
            return None
        alive = self.alive.view()
        if step.valid is not None:
            alive &= step.valid.cumsum(1) > 0
        newest = alive.flip(1).cumsum(1).flip(1) <= self.newest(step.budget)
        worth = self.worth.view().masked_fill(newest, torch.inf).masked_fill(~alive, -torch.inf)
        kept = step.n - 1 - highest(sortable(worth).flip(1), step.budget)  # of equals the newer
        kept = kept.sort(1).values
        counts = alive.gather(1, kept)
        alive.zero_().scatter_(1, kept, counts)
        return kept, counts

    def truncate(self, n: int) -> None:
        self.alive.truncate(n)
        self.worth.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.alive.reorder(rows)
        self.worth.reorder(rows)

    @property
    def nbytes(self) -> int:
        return self.alive.view().nbytes + self.worth.view().nbytes


def causal_weights(queries, keys, valid, scaling: float, last: int | None = None) -> Iterator[torch.Tensor]:
    """Causal attention weights of queries (B, H, q, D), the newest tokens of keys (B, Hkv, n, D).

    Yields (B, Hkv, G, m, e) for each block of m queries, over the e keys visible to the last of them.

    valid  (B, n) bool, False for padding, or None
    last   only this many of the queries
    """
    n, new = keys.shape[2], queries.shape[2]
    keys = keys.float().transpose(2, 3)[:, :, None]
    queries = queries.float().unflatten(1, (keys.shape[1], -1)) * scaling
    for at in range(0 if last is None else max(0, new - last), new, BLOCK):
        part = queries[:, :, :, at : at + BLOCK]
        end = n - new + at + part.shape[3]
        logits = part @ keys[..., :end]
        key = torch.arange(end, device=keys.device)
        newest = key[end - part.shape[3] :, None]  # each query's own position
        hidden = key > newest  # (m, e)
        if valid is not None:
            hidden = hidden | ~valid[:, None, None, None, :end]
            hidden = hidden & (key != newest)  # a padded query sees itself
        yield logits.masked_fill_(hidden, -torch.inf).softmax(-1)
