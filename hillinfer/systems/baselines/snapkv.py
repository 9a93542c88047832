"""SnapKV (arXiv 2404.14469): after the prefill, its last queries vote once for the tokens to keep.

As in the paper's code, votes are pooled along the sequence, so that a token's neighbours are kept with it. As in the
paper each KV head has its own set, where the KV is in memory; else the heads of a layer share one. Tokens after the
prompt are kept within the budget.
"""

import torch
import torch.nn.functional as F

from hillinfer.systems.baselines.eviction import Eviction, causal_weights


class SnapKV(Eviction):
    """The tokens that the last 32 queries of the prefill attend to most, and all newer ones; others are evicted."""

    fresh = torch.inf  # until the next vote
    window, kernel = 32, 7  # voting queries, and tokens per pooled vote: the paper's LongBench settings

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, valid, scaling: float) -> None:
        votes = sum(weights.sum(3) for weights in causal_weights(queries, keys, valid, scaling, self.window))
        pooled = F.max_pool1d(votes.flatten(1, 2), self.kernel, 1, self.kernel // 2)
        votes = F.pad(pooled.sum(1)[:, : -self.window], (0, self.window), value=torch.inf)  # the window itself is kept
        self.worth = self.of_kept(votes[:, -self.n :]).masked_fill(self.worth == -torch.inf, -torch.inf)

    def newest(self, budget: int) -> int:
        return 1
