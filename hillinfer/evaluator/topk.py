"""Top-k positions; ties go to the lowest position."""

import numpy as np
import torch

from hillinfer import native


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest int32 scores of (n,), best first; ties go to the lowest position."""
    return native.topk(scores, k) if native.available() else topk_reference(torch.from_numpy(scores), k).numpy()


def topk_reference(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`topk` of int32 (..., n) in torch, on any device and without a wait: int64 (..., k).

    Score and position form one sortable integer: a total order, so that the result is unique.
    """
    n = scores.shape[-1]
    order = torch.arange(0, -n, -1, dtype=torch.int64, device=scores.device)
    return order.add(scores, alpha=1 << 32).topk(min(k, n)).indices


def highest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`topk` of each row of int32 (B, n), where they are."""
    if scores.device.type != "cpu":
        return topk_reference(scores, k)
    return torch.from_numpy(np.stack([topk(row, k) for row in scores.numpy()]))
