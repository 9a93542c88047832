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


def widen(boxes: torch.Tensor, index: torch.Tensor, keys: torch.Tensor) -> None:
    """Extend boxes (..., m, Hkv, 2, D) in place to contain keys (..., Hkv, n, D), each in the box at index (n,)."""
    tokens = keys.transpose(-3, -2)
    index = index[:, None, None].expand_as(tokens)
    for side, most in enumerate(("amax", "amin")):
        boxes[..., side, :] = boxes[..., side, :].scatter_reduce(-3, index, tokens, most)


def sortable(values: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
    """float32 values as int32 with the same order, in the same form."""
    bits = values.view(torch.int32) if torch.is_tensor(values) else np.ascontiguousarray(values).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
