"""InfiniGen (arXiv 2406.19707): scores from a few columns of skewed queries and keys.

The paper skews W_Q and W_K offline by the SVD of sample queries and selects with layer i-1's input. Here the basis is
computed at prefill from the prompt's queries after the rotary embedding, so that no weight changes, and the speculated
selection is a prefetch, corrected by the true query. As in the paper, the columns are the ones with the largest skewed
queries and keys. The paper takes the tokens within 4 of a head's best score, on average over heads; here the budget is
the number, as for every system, which is better on a real model (docs/experiments.md).
"""

import torch

from hillinfer.evaluator.policy import Policy, Step
from hillinfer.growable import Growable
from hillinfer.systems.boxes import sortable


class InfiniGen(Policy):
    """The window and the tokens whose partial, skewed keys some head gives most."""

    needs_codes = False
    per_head = can_speculate = fills = True
    watches = True
    late = False  # its basis needs the prompt's queries
    ratio = 0.2  # fraction of the columns: the paper's partial weight ratio

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        self.columns = max(1, round(self.ratio * head_dim))
        self.basis = None  # (B, Hkv, D, r)
        self.partial = Growable((batch, kv_heads, 0, self.columns), 2, torch.float32, self.device)
        self.waiting: list[torch.Tensor] = []  # keys appended before there is a basis

    def append(self, keys: torch.Tensor) -> None:
        keys = keys.to(self.device, torch.float32)
        if self.basis is None:
            self.waiting.append(keys)
        else:
            self.partial.append(keys @ self.basis)

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, valid, scaling: float) -> None:
        if self.basis is None:
            queries = queries.to(self.device, torch.float32)
            self._skew(queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3))

    def choose(self, step: Step) -> tuple[torch.Tensor, None] | None:
        if self.basis is None:  # the prompt was decoded token by token
            self._skew(torch.cat(self.waiting, 2))
        query = step.query.float().unflatten(1, (self.basis.shape[1], -1)) * step.scaling
        logits = (query @ self.basis) @ self.partial.view().mT
        if step.valid is not None:
            logits = logits.masked_fill(~step.valid[:, None, None], -torch.inf)
        return step.best(sortable((logits - logits.logsumexp(3, keepdim=True)).amax((1, 2)))), None

    def _skew(self, queries: torch.Tensor) -> None:
        """Compute the basis from queries (B, Hkv, m, D), and the partial keys appended so far."""
        keys, self.waiting = torch.cat(self.waiting, 2), []
        axes, *_ = torch.linalg.svd(queries.transpose(2, 3) @ queries)  # (B, Hkv, D, D): the queries' right vectors
        weight = (queries @ axes).abs().sum(2) + (keys @ axes).abs().sum(2)
        chosen = weight.topk(self.columns, 2).indices
        self.basis = axes.gather(3, chosen[:, :, None].expand(-1, -1, axes.shape[2], -1))
        self.partial.append(keys @ self.basis)

    def truncate(self, n: int) -> None:
        self.partial.truncate(n)
        self.waiting = [torch.cat(self.waiting, 2)[:, :, :n]] if self.waiting else []

    def reorder(self, rows: torch.Tensor) -> None:
        self.partial.reorder(rows)
        rows = rows.to(self.device)
        self.waiting = [keys[rows] for keys in self.waiting]
        self.basis = None if self.basis is None else self.basis[rows]

    @property
    def nbytes(self) -> int:
        keys = self.partial.view().nbytes + sum(keys.nbytes for keys in self.waiting)
        return keys + (0 if self.basis is None else self.basis.nbytes)
