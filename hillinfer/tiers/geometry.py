"""The shape of one layer's KV records."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Geometry:
    """One record is one token's K and V of all KV heads side by side: (2, Hkv, D).

    Token-major records make one token's read one contiguous range; for Llama-3-8B in bf16 exactly 4 KiB.
    """

    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def record_shape(self) -> tuple[int, int, int]:
        return (2, self.kv_heads, self.head_dim)

    @cached_property
    def record_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def as_bytes(self, records: torch.Tensor) -> np.ndarray:
        """Records (n, 2, Hkv, D) as (n, record_bytes) uint8; a view where they are contiguous."""
        return records.contiguous().view(torch.uint8).reshape(len(records), self.record_bytes).numpy()

    def empty(self, *lead: int, device="cpu") -> torch.Tensor:
        """Uninitialised records, shape (*lead, 2, Hkv, D)."""
        return torch.empty((*lead, *self.record_shape), dtype=self.dtype, device=device)
