"""The hit table: how often each token was selected (HillInfer section 1.3, frequency rule)."""

import numpy as np

AGE_STEPS = 64  # counts are halved this often, so that old favourites make room; our choice, the paper gives none


class HitTable:
    """One 16-bit counter per token and batch row, shared by all layers: 2N bytes."""

    def __init__(self, batch: int):
        self.counts = np.zeros((batch, 0), np.uint16)
        self.n = 0

    def extend(self, n: int) -> None:
        """Cover tokens up to n."""
        if n > self.counts.shape[1]:
            grown = np.zeros((len(self.counts), n + max(256, n // 8)), np.uint16)
            grown[:, : self.counts.shape[1]] = self.counts
            self.counts = grown
        self.n = max(self.n, n)

    def touch(self, row: int, positions: np.ndarray) -> None:
        """Count one selection of each of these tokens; counters stop at 65,535."""
        counts = self.counts[row]
        counts[positions] += counts[positions] < np.iinfo(np.uint16).max

    def age(self) -> None:
        self.counts >>= 1

    def truncate(self, n: int) -> None:
        self.counts[:, n:] = 0
        self.n = min(self.n, n)

    @property
    def nbytes(self) -> int:
        return 2 * self.n * len(self.counts)
