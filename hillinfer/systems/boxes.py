"""Min/max boxes of chunks of keys and the score bounds that they imply (Quest, LeoAM).

A box has the maximum and minimum of each channel over a chunk's keys, per KV head. `bounds` is an upper bound on the
score of every key in it.
"""

import numpy as np
import torch

# The box of no keys; finite, as 0 * inf would be NaN.
EMPTY = torch.tensor([-1e30, 1e30], dtype=torch.float32, device="cpu")[:, None]


def bounds(boxes: torch.Tensor, query: torch.Tensor, slack: float = 1.0) -> torch.Tensor:
    """Upper bounds on q.k: boxes (..., m, Hkv, 2, D) as (max, min), query (..., Hkv, G, D) -> (..., Hkv, m, G).

    slack  below 1, an estimate: this fraction of the way from the midpoint of the possible scores to the bound

    max(q * max, q * min), summed over channels, is a dot product once the query is split by sign (Quest section 3).
    """
    above, below = query.clamp(min=0), query.clamp(max=0)
    up, down = (1 + slack) / 2, (1 - slack) / 2
    split = torch.cat((up * above + down * below, up * below + down * above), -1)  # (..., Hkv, G, 2D)
    return torch.matmul(boxes.flatten(-2).transpose(-3, -2), split.mT)


def widen(boxes: torch.Tensor, at: int, size: int, keys: torch.Tensor) -> None:
    """Extend boxes (..., m, Hkv, 2, D), each of `size` tokens, in place to contain keys (..., Hkv, n, D) from token
    `at` on. Whole boxes are reduced at once: scattering token by token would take six times as long.
    """
    n, head = keys.shape[-2], min(keys.shape[-2], -at % size)
    whole = (n - head) // size * size
    for part in keys.transpose(-3, -2).split((head, whole, n - head - whole), -3):
        if count := part.shape[-3]:
            chunks = part.unflatten(-3, (-1, min(size, count)))  # (..., c, tokens, Hkv, D)
            own = boxes.narrow(-4, at // size, chunks.shape[-4])
            own[..., 0, :] = own[..., 0, :].maximum(chunks.amax(-3))
            own[..., 1, :] = own[..., 1, :].minimum(chunks.amin(-3))
            at += count


def sortable(values: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
    """float32 values as int32 with the same order, in the same form."""
    bits = values.view(torch.int32) if torch.is_tensor(values) else np.ascontiguousarray(values).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
