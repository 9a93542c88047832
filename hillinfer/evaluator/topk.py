"""Top-k positions; ties go to the lowest position."""

import numpy as np
import torch

from hillinfer import native


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest int32 scores of (n,), best first; ties go to the lowest position."""
    return native.topk(scores, k) if native.available() else topk_reference(scores, k)


def merge_heads(scores: np.ndarray, k: int) -> np.ndarray:
    """One selection for all KV heads of a layer: int32 scores (Hkv, n) -> k positions, ascending.

    Round robin: every head's best, then every head's second best, and so on, until there are k distinct positions.
    Scores of different heads have different scales, so only their ranks are compared. Heads share a selection because
    a record contains all of them.
    """
    if native.available():
        return native.merge_heads(scores, k, torch.get_num_threads())
    return merge_heads_reference(scores, k)


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


def merge_heads_reference(scores: np.ndarray, k: int) -> np.ndarray:
    """`merge_heads` in numpy."""
    turns = np.stack([topk_reference(head, k) for head in scores], 1).reshape(-1)  # rank-major
    _, first = np.unique(turns, return_index=True)
    return np.sort(turns[np.sort(first)[:k]])
