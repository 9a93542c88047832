"""SnapKV (arXiv 2404.14469): once, after a prefill, its last queries vote for the tokens that stay.

As in its code the votes are pooled along the sequence, so that a token's neighbours stay with it. The paper keeps a set
for each head; here a layer's heads share one. What comes after the prompt stays while the budget holds it.
"""

import numpy as np
import torch
import torch.nn.functional as F

from hillinfer.evaluator.policies.eviction import Eviction, causal_weights
from hillinfer.evaluator.policy import Step


class SnapKV(Eviction):
    """The tokens that the last 32 queries of the prefill attend to most, and all newer ones; no second choice."""

    window, kernel = 32, 7  # queries that vote, tokens over which votes are pooled: its LongBench settings

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, valid, scaling: float) -> None:
        votes = sum(weights.sum(3) for weights in causal_weights(queries, keys, valid, scaling, self.window))
        pooled = F.max_pool1d(votes.flatten(1, 2), self.kernel, 1, self.kernel // 2)
        self.worth[:, : self.n] = pooled.sum(1).numpy(force=True)
        self.worth[:, max(0, self.n - self.window) : self.n] = np.inf  # the window itself stays

    def append(self, keys: torch.Tensor) -> None:
        super().append(keys)
        self.worth[:, self.n - keys.shape[2] : self.n] = np.inf  # until the next vote

    def select(self, step: Step) -> np.ndarray | None:
        return self.keep(step, 1)
