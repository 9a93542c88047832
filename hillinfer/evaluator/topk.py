"""Top-k positions; ties go to the lowest position."""

import numpy as np
import torch

from hillinfer import native


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest int32 scores of (n,), best first; ties go to the lowest position."""
    return native.topk(scores, k) if native.available() else topk_reference(scores, k)


def topk_reference(scores: np.ndarray, k: int) -> np.ndarray:
    """`topk` in torch."""
    return highest(torch.from_numpy(scores), k).numpy()


def highest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`topk` of each row of integers (..., n) of 32 bits, on any device and without a wait: int64 (..., k).

    Score and position form one sortable integer: a total order, so that the result is unique.
    """
    n = scores.shape[-1]
    order = torch.arange(n, dtype=torch.int64, device=scores.device)
    return ((scores.long() << 32) - order).topk(min(k, n)).indices
