"""Attention over KV that arrives in parts: the softmax is kept as running maximum, sum and weighted values.

So a prefill chunk or a new turn never needs all of a layer's KV in memory at once (online softmax).
"""

from collections.abc import Iterable

import torch


def blockwise_attention(
    query: torch.Tensor, parts: Iterable[torch.Tensor], visible: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Exact attention of query (B, H, q, D) over records (B, n, 2, Hkv, D) that together hold all N tokens in order.

    visible  bool, broadcasts to (B, 1, q, N)
    Returns (B, H, q, D) in the query's type; sums are in float32.
    """
    batch, heads, rows, dim = query.shape
    top = total = out = None
    start = 0
    for kv in parts:
        keys, values = kv.float().permute(2, 0, 3, 1, 4)  # (B, Hkv, n, D) each
        kv_heads, n = keys.shape[1:3]
        if out is None:
            grouped = query.float().reshape(batch, kv_heads, -1, dim) * scaling  # (B, Hkv, G*q, D)
            out = torch.zeros_like(grouped)
            total = grouped.new_zeros((*grouped.shape[:3], 1))
            top = torch.full_like(total, torch.finfo(torch.float32).min)
        scores = grouped @ keys.transpose(2, 3)
        hidden = ~visible[..., start : start + n].unsqueeze(1)  # (B, 1, 1, q, n)
        scores.view(batch, kv_heads, -1, rows, n).masked_fill_(hidden, torch.finfo(torch.float32).min)
        higher = torch.maximum(top, scores.amax(3, keepdim=True))
        weights = scores.sub_(higher).exp_()
        fade = (top - higher).exp_()
        total = total.mul_(fade).add_(weights.sum(3, keepdim=True))
        out = out.mul_(fade).add_(weights @ values)
        top, start = higher, start + n
    return (out / total).view(batch, heads, rows, dim).to(query.dtype)
