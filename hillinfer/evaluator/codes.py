"""INT8 key codes and their exact scores.

A channel's scale is folded into the query, which is then quantised as well, so that a score is a dot product of
integers: the same to the bit on numpy, in torch, in an emulated drive and in hardware (HillInfer CEC: no softmax and
no scaling where the keys are scored).
"""

import numpy as np
import torch

from hillinfer.growable import Growable

TOP = 127
EXACT_FP32_DIM = 2**24 // TOP**2  # 1,040: up to this head_dim an fp32 sum of code products is exact in any order


class KeyCodes:
    """Symmetric INT8 codes of all keys of one layer, per KV head and channel: codes (B, Hkv, n, D), scale (B, Hkv, 1,
    D).
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int):
        if head_dim > EXACT_FP32_DIM:
            raise ValueError(f"head_dim {head_dim} is above {EXACT_FP32_DIM}, where integer scores stop being exact")
        self.codes = Growable((batch, kv_heads, 0, head_dim), 2, torch.int8)
        self.scale = torch.zeros((batch, kv_heads, 1, head_dim))

    def append(self, keys: torch.Tensor) -> None:
        """Code new keys (B, Hkv, n, D).

        A channel that outgrows its scale doubles it as often as needed and halves its old codes, so that codes never
        saturate and are never more than one step off the direct quantisation.
        """
        keys = keys.to("cpu", torch.float32)
        need = keys.abs().amax(2, keepdim=True) / TOP
        fresh = self.scale == 0
        doublings = torch.where((need > self.scale) & ~fresh, torch.log2(need / self.scale).ceil(), 0).clamp_(min=0)
        if doublings.any():
            old = self.codes.view()
            old.copy_((old.float() / 2**doublings).round_())
        self.scale = torch.where(fresh, need, self.scale * 2**doublings)
        new = (keys / self.scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-TOP, TOP)
        self.codes.append(new.to(torch.int8))

    def query(self, query: torch.Tensor, row: int) -> torch.Tensor:
        """Fold the scales into a query (H, D) and quantise it: int8 (Hkv, G, D). One step size for each KV head's
        group, so that scores of its query heads can be compared."""
        scale = self.scale[row]  # (Hkv, 1, D)
        folded = query.to("cpu", torch.float32).view(scale.shape[0], -1, scale.shape[2]) * scale
        step = (folded.abs().amax((1, 2), keepdim=True) / TOP).clamp(min=torch.finfo(torch.float32).tiny)
        return (folded / step).round_().clamp_(-TOP, TOP).to(torch.int8)

    def scores(self, query: torch.Tensor, row: int) -> np.ndarray:
        """Integer scores of a quantised query (Hkv, G, D) against all keys of a row, the group reduced by max: (Hkv,
        n) int32.
        """
        return group_scores(query, self.codes.view()[row])

    def truncate(self, n: int) -> None:
        self.codes.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.codes.reorder(rows)
        self.scale = self.scale.index_select(0, rows.to("cpu"))

    @property
    def nbytes(self) -> int:
        return self.codes.view().nbytes + self.scale.nbytes


def group_scores(query: torch.Tensor, codes: torch.Tensor, block: int = 4096) -> np.ndarray:
    """query int8 (Hkv, G, D), codes int8 (Hkv, n, D) -> (Hkv, n) int32, max over the group.

    fp32 is exact here: every partial sum is an integer below 2**24. Blocks keep the converted codes in the
    processor's cache.
    """
    query = query.float().transpose(1, 2)  # (Hkv, D, G)
    out = torch.empty(codes.shape[:2], dtype=torch.int32)
    for start in range(0, codes.shape[1], block):
        part = codes[:, start : start + block].float()
        out[:, start : start + block] = torch.matmul(part, query).amax(2).to(torch.int32)
    return out.numpy()


def group_scores_reference(query: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The definition, in int64 numpy: what every other implementation must equal exactly."""
    return np.einsum("hgd,hnd->hgn", query.astype(np.int64), codes.astype(np.int64)).max(1).astype(np.int32)
