"""The device window: the first and the newest records, on the model's device."""

import numpy as np
import torch

from hillinfer.tiers.geometry import Geometry


class Window:
    """`sinks` first and `recent` last tokens of every row: the ones nearly every step attends to, so they never
    travel.
    """

    def __init__(self, geometry: Geometry, sinks: int, recent: int):
        self.sinks, self.recent, self.n = sinks, recent, 0
        self.first = geometry.empty(geometry.batch, 0, device=geometry.device)
        self.last = geometry.empty(geometry.batch, 0, device=geometry.device)

    def append(self, kv: torch.Tensor) -> None:
        """kv (B, n, 2, Hkv, D)."""
        if self.first.shape[1] < self.sinks:
            self.first = torch.cat((self.first, kv[:, : self.sinks - self.first.shape[1]]), 1)
        self.last = torch.cat((self.last, kv[:, -self.recent :]), 1)[:, -self.recent :].contiguous()
        self.n += kv.shape[1]

    def holds(self, positions: np.ndarray) -> np.ndarray:
        return (positions < self.first.shape[1]) | (positions >= self.n - self.last.shape[1])

    def take(self, row: int, positions: np.ndarray) -> torch.Tensor:
        """Records of positions that it holds: (k, 2, Hkv, D)."""
        start = self.n - self.last.shape[1]
        early = positions < start
        index = np.where(early, positions, positions - start + self.first.shape[1])
        both = torch.cat((self.first[row], self.last[row]))
        return both.index_select(0, torch.from_numpy(index).to(both.device))

    def refill(self, n: int, kv: torch.Tensor) -> None:
        """After a truncation to n tokens: kv holds the records of the last min(recent, n)."""
        self.first = self.first[:, : min(n, self.sinks)]
        self.last, self.n = kv.contiguous(), n

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.last.nbytes
