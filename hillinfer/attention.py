"""Attention of one query token: over records where they lie, by the native kernel, or over tensors, by torch."""

import numpy as np
import torch
import torch.nn.functional as F

from hillinfer import native

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def is_native(query: torch.Tensor) -> bool:
    """Whether the kernel can serve this query: it reads host memory."""
    host = query.device.type == "cpu" and query.dtype in DTYPES
    return host and query.shape[3] <= native.MAX_DIM and native.available()


def over_records(query: torch.Tensor, rows: list[np.ndarray | tuple], kv_heads: int, scaling: float) -> torch.Tensor:
    """query (B, H, 1, D) over each row's records K (Hkv, D), V (Hkv, D) of its dtype, given by `native.attend`'s
    addresses; (B, 1, H, D). No gather buffer, and sums in fp32.
    """
    batch, heads, _, dim = query.shape
    whole, out = query.float().reshape(batch, heads, dim), torch.empty((batch, 1, heads, dim))
    native.attend(whole.contiguous(), rows, DTYPES[query.dtype], kv_heads, scaling, out, torch.get_num_threads())
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
