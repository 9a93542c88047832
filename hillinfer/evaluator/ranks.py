"""One order of a layer's tokens from the scores of all query heads: a token's log-probability in the head that likes it
most.

A record holds all KV heads, so the heads of a layer share a selection. Scores of two heads differ in scale and spread;
log-probabilities compare. On a real model this halves the divergence of a selection in which heads take turns
(docs/experiments.md). In fixed point and with sums of integers: bit-identical in torch, C and hardware.
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
    return head_ranks_reference(torch.from_numpy(scores), torch.from_numpy(steps)).numpy()


def head_ranks_reference(scores: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The definition, on any device: int32 (..., n) by int32 scores (..., H, n) and steps float32 (..., H) of one."""
    apart = (scores.amax(-1, keepdim=True).long() - scores).float() * steps[..., None]
    below = apart.clamp(max=FAR).long()
    weights = (8192 - (below & 4095) << 7) >> (below >> 12).clamp(max=31)  # 2**20 * 2**(-below / STEPS), nearly
    return (-below - (_log2(weights.sum(-1)) - 20 * STEPS)[..., None]).amax(-2).int()


def _log2(total: torch.Tensor) -> torch.Tensor:
    """log2 of int64 below 2**53, in STEPS, rounded down: a bit of the fraction for each squaring."""
    whole = torch.frexp(total.double()).exponent.long() - 1
    m, fraction = (total << (31 - whole).clamp(min=0)) >> (whole - 31).clamp(min=0), 0
    for _ in range(12):
        high, low = m >> 16, m & 0xFFFF  # m * m >> 31 of 32 bits, in halves
        m = (high * high << 1) + ((high * low << 17) + low * low >> 31)
        fraction = fraction << 1 | m >> 32
        m = m >> (m >> 32)
    return whole * STEPS + fraction
