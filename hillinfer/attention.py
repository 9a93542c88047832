"""Attention of one query token: over records where they lie, by the native kernel, or over tensors, by torch."""

import numpy as np
import torch
import torch.nn.functional as F

from hillinfer import native


def is_native(query: torch.Tensor) -> bool:
    """Whether the kernel can serve this query: it reads host memory."""
    dtype = str(query.dtype).removeprefix("torch.")
    return query.device.type == "cpu" and dtype in native.DTYPES and query.shape[3] <= 1024 and native.available()


def over_records(query: torch.Tensor, rows: list[np.ndarray | tuple], kv_heads: int, scaling: float) -> torch.Tensor:
    """query (B, H, 1, D) over each row's records K (Hkv, D), V (Hkv, D) of its dtype, given by `native.attend`'s
    addresses; (B, 1, H, D). No gather buffer, and sums in fp32.
    """
    batch, heads, _, dim = query.shape
    whole = query.to(torch.float32).reshape(batch, heads, dim).contiguous()
    out, dtype = torch.empty((batch, 1, heads, dim)), str(query.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    for row, where in enumerate(rows):
        native.attend(whole[row], where, dtype, kv_heads, scaling, out[row], threads)
    return out.to(query.dtype)


def over_tensors(query: torch.Tensor, kv: torch.Tensor, valid: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """The same in torch, and the definition: kv (B, n, 2, Hkv, D), valid (B, n) bool or None."""
    batch, heads, _, dim = query.shape
    out = F.scaled_dot_product_attention(
        query.view(batch, kv.shape[3], -1, dim),  # (B, Hkv, G, D): a group shares its keys, nothing is repeated
        kv[:, :, 0].transpose(1, 2),
        kv[:, :, 1].transpose(1, 2),
        attn_mask=None if valid is None else valid[:, None, None].to(query.device),
        scale=scaling,
    )
    return out.reshape(batch, 1, heads, dim)
