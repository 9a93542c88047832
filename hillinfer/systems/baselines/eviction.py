"""Permanent eviction, shared by H2O and SnapKV: the set of live tokens, and attention weights of the prefill."""

from collections.abc import Iterator

import numpy as np
import torch

from hillinfer.evaluator.policy import Policy, Step

BLOCK = 128  # queries per block of attention weights


class Eviction(Policy):
    """An evicted token is never selected again. Its record stays in the store, so that later turns prefill exactly."""

    needs_codes = False
    watches = True
    per_head = True
    late = False

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        self.n = 0
        self.alive = np.zeros((batch, 0), bool)
        self.worth = np.zeros((batch, 0), np.float32)

    def append(self, keys: torch.Tensor) -> None:
        new = keys.shape[2]
        self.n += new
        short = self.n - self.alive.shape[1]
        if short > 0:
            room = ((0, 0), (0, max(256, short)))
            self.alive, self.worth = np.pad(self.alive, room), np.pad(self.worth, room)
        self.alive[:, self.n - new : self.n], self.worth[:, self.n - new : self.n] = True, 0

    def keep(self, step: Step, newest: int) -> np.ndarray | None:
        """Select the newest tokens and the ones of highest worth within the budget; evict all others."""
        if step.budget >= step.n:
            return None
        alive = self.alive[step.row, : step.n]
        alive[: step.first] = False
        candidates = np.flatnonzero(alive)
        if len(candidates) > step.budget:
            worth = self.worth[step.row, candidates].copy()
            worth[len(candidates) - newest :] = np.inf
            order = np.lexsort((candidates, worth))
            alive[candidates[order[: -step.budget]]] = False
        return np.flatnonzero(alive)

    def truncate(self, n: int) -> None:
        self.n = n

    def reorder(self, rows: torch.Tensor) -> None:
        self.alive, self.worth = self.alive[rows.numpy(force=True)], self.worth[rows.numpy(force=True)]

    @property
    def nbytes(self) -> int:
        return self.alive.nbytes + self.worth.nbytes


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
