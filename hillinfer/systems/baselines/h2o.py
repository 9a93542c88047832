"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention, and recent tokens; all others are evicted.

As in the paper each KV head has its own set, where the KV is in memory; else the heads of a layer share one, by the
sum of their weights.
"""

import torch

from hillinfer.systems.baselines.eviction import Eviction, causal_weights


class H2O(Eviction):
    """The newest tokens and the ones with the most attention so far, in equal parts; others are evicted for good."""

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, valid, scaling: float) -> None:
        for weights in causal_weights(queries, keys, valid, scaling):
            self.worth = self.worth + self.of_kept(weights.sum((1, 2, 3)))

    def attended(self, picked: torch.Tensor, weights: torch.Tensor) -> None:
        dense = weights.new_zeros(len(weights), self.n).scatter_add_(1, picked, weights.sum(1))
        self.worth = self.worth + self.of_kept(dense)

    def newest(self, budget: int) -> int:
        return budget // 2
