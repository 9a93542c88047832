"""Top-k positions; ties go to the lowest position."""

import numpy as np

from hillinfer import native


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest int32 scores of (n,), best first; ties go to the lowest position."""
    return native.topk(scores, k) if native.available() else topk_reference(scores, k)


def topk_reference(scores: np.ndarray, k: int) -> np.ndarray:
    """`topk` in numpy.

    Score and position form one sortable integer: a total order, so that argpartition's result is unique.
    """
    n = len(scores)
    k = min(k, n)
    if k == 0:
        return np.zeros(0, np.int64)
    rank = (scores.astype(np.int64) << 32) - np.arange(n)
    best = np.argpartition(rank, n - k)[n - k :] if k < n else np.arange(n)
    return best[np.argsort(-rank[best])]
