"""Selection by key codes that lie on a GPU, in torch alone: to the bit that of the host's kernels, and without a wait.

Not part of the package yet: gpu_rates measures what it would take there.
"""

import numpy as np
import torch

from hillinfer import native
from hillinfer.evaluator.ranks import FAR

NEVER = torch.iinfo(torch.int32).min + 1  # the score of padding


def select(
    codes: torch.Tensor, query: torch.Tensor, steps: torch.Tensor, k: int, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """The k tokens that rank highest, int64 (B, k) ascending; ties go to the lowest position.

    codes   int8 (B, Hkv, n, D)
    query   int8 (B, Hkv, G, D)
    steps   float32 (B, Hkv*G), of one score (`ranks.head_ranks_reference`)
    hidden  bool (B, n), True for padding
    """
    found = scores(codes, query)
    found = found if hidden is None else found.masked_fill(hidden[:, None], NEVER)
    order = head_ranks(found, steps).sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(1).values


def scores(codes: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """int64 (B, Hkv*G, n). bf16 holds codes, and fp32 sums of their products below 2**24, exactly: in any order."""
    batch, _, n, _ = codes.shape
    keys, asked = (part.flatten(0, 1).to(torch.bfloat16) for part in (codes, query))
    if codes.device.type == "cpu":
        out = asked.float() @ keys.float().mT
    else:
        out = torch.bmm(asked, keys.mT, out_dtype=torch.float32)
    return out.view(batch, -1, n).long()


def head_ranks(scores: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """`ranks.head_ranks_reference` of each row: int64 (B, n)."""
    apart = (scores.amax(2, keepdim=True) - scores).float() * steps[:, :, None]
    below = apart.clamp(max=FAR).long()
    weights = (8192 - (below & 4095) << 7) >> (below >> 12).clamp(max=31)
    return (-below - (log2(weights.sum(2)) - 20 * 4096)[:, :, None]).amax(1)


def log2(total: torch.Tensor) -> torch.Tensor:
    """log2 of positive int64 in 1/4096, rounded down: a bit of the fraction for each squaring."""
    whole = torch.frexp(total.double()).exponent.long() - 1  # exact below 2**53
    m, fraction = total << 31 >> whole, torch.zeros_like(total)
    for _ in range(12):
        high, low = m >> 16, m & 0xFFFF  # m * m >> 31 of 33 bits, in halves
        m = (high * high << 1) + ((high * low << 17) + low * low >> 31)
        fraction = fraction << 1 | m >> 32
        m = m >> (m >> 32)
    return whole * 4096 + fraction


def on_host(codes: torch.Tensor, query: torch.Tensor, steps: torch.Tensor, k: int, hidden=None) -> np.ndarray:
    """`select` of one sequence by the host's kernels."""
    found = native.score(query, codes, 8, None, torch.get_num_threads())
    if hidden is not None:
        found[:, hidden] = NEVER
    return np.sort(native.topk(native.head_ranks(found, steps.numpy(), torch.get_num_threads()), k))
