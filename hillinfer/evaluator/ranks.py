"""One order of a layer's tokens from the scores of all query heads: a token's log-probability in the head that likes it
most.

A record holds all KV heads, so the heads of a layer share a selection. Scores of two heads differ in scale and spread;
log-probabilities compare. On a real model this halves the divergence of a selection in which heads take turns
(docs/experiments.md). In fixed point and with sums of integers: bit-identical in torch, C and hardware.
"""

import functools

import numpy as np
import torch

from hillinfer import native

STEPS = 4096  # to a factor of two
FAR = 1 << 30  # the most steps that a score lies below its head's highest
FIRST, LAST = 20, 44  # log2 of one token's greatest weight, and of more than any sum of them


def head_ranks(scores: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Ranks int32 (n,) of int32 scores (H, n): log2-probabilities in STEPS, so higher is better.

    unit  float32 (H,), the logit (nats) of one score
    """
    steps = unit * np.float32(STEPS / np.log(2))
    if native.available():
        return native.head_ranks(scores, steps, torch.get_num_threads())
    return head_ranks_reference(torch.from_numpy(scores), torch.from_numpy(steps)).numpy()


def head_ranks_reference(scores: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The definition, on any device: int32 (..., n) by whole scores (..., H, n) below 2**24, or NEVER, and steps fp32
    (..., H) of one.
    """
    scores = scores.float()
    apart = (scores.amax(-1, keepdim=True) - scores).mul_(steps[..., None]).clamp_(max=FAR)
    below = apart.int()
    # 2**20 * 2**(-below / STEPS), nearly: the bits of a float are linear between powers of two
    weights = torch.rsub(below.clamp(max=(FIRST + 2) * STEPS), FIRST + 127 << 23, alpha=1 << 11).view(torch.float32)
    level = torch.searchsorted(sums(scores.device), weights.long().sum(-1), right=True, out_int32=True) - 1
    return below.add_(level[..., None]).amin(-2).neg_()


@functools.cache
def sums(device: torch.device) -> torch.Tensor:
    """The least sum of weights, int64, of each level: log2 of a sum, less FIRST, in STEPS, rounded down."""
    level, least = np.arange(STEPS), np.full(STEPS, 1 << 31, np.uint64)  # of 32 bits, by bisection
    for bit in reversed(range(31)):
        m, fraction = least + (1 << bit) - 1, 0
        for _ in range(12):  # a bit of the fraction for each squaring
            m = m * m >> 31
            fraction = fraction << 1 | m >> 32
            m >>= m >> 32
        least = np.where(fraction < level, least + (1 << bit), least)
    each = [least + (1 << 31 - at) - 1 >> 31 - at if at < 32 else least << at - 31 for at in range(FIRST, LAST)]
    return torch.from_numpy(np.concatenate(each).astype(np.int64)).to(device)
