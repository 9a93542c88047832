"""Permanent eviction, shared by H2O and SnapKV: the set of live tokens, and attention weights of the prefill."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from hillinfer.evaluator.policy import Policy, Step
from hillinfer.evaluator.topk import highest
from hillinfer.systems.boxes import sortable

BLOCK = 128  # queries per block of attention weights


class Eviction(Policy):
    """An evicted token is never selected again. Its record stays in the store, so that later turns prefill exactly.

    kept   positions (B, m), ascending, of the tokens that are not evicted
    worth  float32 (B, m); minus infinity for padding and what has been forgotten, which does not count
    """

    needs_codes = False
    watches = True
    per_head = fills = True
    late = False
    fresh = 0.0  # worth of a new token

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        self.n = 0
        self.kept = torch.zeros((batch, 0), dtype=torch.int64, device=self.device)
        self.worth = torch.zeros((batch, 0), dtype=torch.float32, device=self.device)

    def append(self, keys: torch.Tensor) -> None:
        new = torch.arange(self.n, self.n + keys.shape[2], dtype=torch.int64, device=self.device)
        self.n += len(new)
        self.kept = torch.cat((self.kept, new.expand(len(keys), -1)), 1)
        self.worth = F.pad(self.worth, (0, len(new)), value=self.fresh)

    def newest(self, budget: int) -> int:
        """How many of the newest tokens are kept whatever their worth."""
        raise NotImplementedError

    def choose(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The newest tokens and those of highest worth within the budget; all others are evicted."""
        if step.valid is not None:
            self.worth = self.worth.masked_fill(self.of_kept(step.valid.cumsum(1)) == 0, -torch.inf)
        if (m := self.kept.shape[1]) > step.budget:
            counts = self.worth > -torch.inf
            newest = counts & (counts.flip(1).cumsum(1).flip(1) <= self.newest(step.budget))
            ranks = sortable(self.worth.masked_fill(newest, torch.inf)).flip(1)  # of equals the newer is kept
            best = (m - 1 - highest(ranks, step.budget)).sort(1).values
            self.kept, self.worth = self.kept.gather(1, best), self.worth.gather(1, best)
        return self.kept.clamp(max=self.n - 1), self.worth > -torch.inf

    def of_kept(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (B, n or less), those of the tokens kept."""
        values = F.pad(values, (0, self.n - values.shape[1])).to(self.device)
        return values.gather(1, self.kept.clamp(max=self.n - 1))

    def truncate(self, n: int) -> None:
        self.n = min(self.n, n)
        self.worth = self.worth.masked_fill(self.kept >= n, -torch.inf)

    def reorder(self, rows: torch.Tensor) -> None:
        self.kept, self.worth = self.kept[rows.to(self.device)], self.worth[rows.to(self.device)]

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes + self.worth.nbytes


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
