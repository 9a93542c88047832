"""The window: the first and the newest records, which need no look-up."""

import numpy as np
import torch

from hillinfer.tiers.geometry import Geometry


class Window:
    """`sinks` first and `recent` last tokens of every sequence: nearly every step attends to them, so they stay here.

    `records` (B, sinks + recent, 2, Hkv, D): the sinks, followed by a ring of the newest tokens.
    """

    def __init__(self, geometry: Geometry, sinks: int, recent: int):
        self.sinks, self.recent, self.n = sinks, recent, 0
        with torch.inference_mode(False):
            self.records = geometry.empty(geometry.batch, sinks + recent)

    def append(self, kv: torch.Tensor) -> None:
        """kv (B, n, 2, Hkv, D)."""
        if self.n < self.sinks:
            head = kv[:, : self.sinks - self.n]
            self.records[:, self.n : self.n + head.shape[1]] = head
        self.n += kv.shape[1]
        self._place(kv[:, -self.recent :])

    def _place(self, kv: torch.Tensor) -> None:
        """Write the newest tokens, at most `recent`, into the ring."""
        first, k = (self.n - kv.shape[1]) % self.recent, kv.shape[1]
        k = min(k, self.recent - first)  # up to the end of the ring; the others wrap around
        self.records[:, self.sinks + first : self.sinks + first + k] = kv[:, :k]
        if k < kv.shape[1]:
            self.records[:, self.sinks : self.sinks + kv.shape[1] - k] = kv[:, k:]

    def far(self, positions: np.ndarray) -> slice:
        """The slice of sorted positions (k,) that are outside the window."""
        first = int(np.searchsorted(positions, self.sinks))
        return slice(first, max(first, int(np.searchsorted(positions, self.n - self.recent))))

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """Indices into `records` of positions in the window."""
        return np.where(positions < self.sinks, positions, self.sinks + positions % self.recent)

    def refill(self, n: int, kv: torch.Tensor) -> None:
        """Restore the window after a truncation to n tokens; kv has the records of the last min(recent, n)."""
        self.n = n
        self._place(kv)

    @property
    def nbytes(self) -> int:
        return self.records.nbytes
