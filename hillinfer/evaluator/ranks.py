"""One order of a layer's tokens from the scores of all query heads: a token's log-probability in the head that likes it
most.

A record holds all KV heads, so the heads of a layer share a selection. Scores of two heads differ in scale and spread;
log-probabilities compare. On a real model this halves the divergence of a selection in which heads take turns
(docs/experiments.md). In fixed point and with sums of integers: bit-identical in numpy, C and hardware.
"""

import numpy as np
import torch

from hillinfer import native

STEPS = 4096  # to a factor of two
FAR = 1 << 30  # the most steps that a score lies below its head's highest


def head_ranks(scores: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Ranks int32 (n,) of int32 scores (H, n): log2-probabilities in STEPS, so higher is better.

    unit  float32 (H,), the logit (nats) of one score
    """
    steps = unit * np.float32(STEPS / np.log(2))
    if native.available():
        return native.head_ranks(scores, steps, torch.get_num_threads())
    return head_ranks_reference(scores, steps)


def head_ranks_reference(scores: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The definition, in numpy: steps float32 (H,) of one score."""
    apart = (scores.max(1, keepdims=True).astype(np.int64) - scores).astype(np.float32) * steps[:, None]
    below = np.minimum(apart, np.float32(FAR)).astype(np.int64)
    weights = (8192 - (below & 4095) << 7) >> np.minimum(below >> 12, 31)  # 2**20 * 2**(-below / STEPS), nearly
    level = [_log2(int(total)) - 20 * STEPS for total in weights.sum(1)]
    return (-below - np.array(level)[:, None]).max(0).astype(np.int32)


def _log2(total: int) -> int:
    """log2 in STEPS, rounded down: a bit of the fraction for each squaring."""
    whole = total.bit_length() - 1
    m, fraction = total << 31 >> whole, 0
    for _ in range(12):
        m = m * m >> 31
        fraction = fraction << 1 | m >> 32
        m >>= m >> 32
    return whole * STEPS + fraction
