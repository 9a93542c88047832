"""What the hot pool ranks tokens by: hit counters, and two controls with the same face.

The paper (HillInfer section 1.3) gives one 16-bit counter for each token, 2N bytes in all, and no ageing. Measured on
the embedded model (docs/experiments.md), layers want different tokens and old favourites clog the pool: counters of
each layer's own that lose an eighth at every step bring fewer bytes from the drive. Both are here.
"""

import numpy as np

ONE = 256  # a hit, in the counters' fixed point
TOP = 65_535


class SharedHits:
    """The paper's table: one counter for each token, for all layers; we halve it every 64 steps.

    `rank[row]` is an array over tokens: what is higher stays in the pool.
    """

    shared = True
    dtype = np.uint16

    def __init__(self, batch: int):
        self.rank = np.zeros((batch, 0), self.dtype)
        self.n = self.steps = 0

    def extend(self, n: int) -> None:
        """Cover tokens up to n."""
        if n > self.rank.shape[1]:
            grown = np.zeros((len(self.rank), n + max(256, n // 8)), self.dtype)
            grown[:, : self.rank.shape[1]] = self.rank
            self.rank = grown
        self.n = max(self.n, n)

    def touch(self, row: int, positions: np.ndarray) -> None:
        """Take note that a step selected these tokens. Counters saturate."""
        rank = self.rank[row]
        rank[positions] += rank[positions] < TOP

    def age(self) -> None:
        """A step is over."""
        self.steps += 1
        if self.steps % 64 == 0:
            self.rank >>= 1

    def truncate(self, n: int) -> None:
        self.rank[:, n:] = 0
        self.n = min(self.n, n)

    @property
    def nbytes(self) -> int:
        return self.rank.itemsize * self.n * len(self.rank)


class LayerHits(SharedHits):
    """A layer's own counters, 2N bytes: a hit adds ONE, a step takes an eighth away."""

    shared = False

    def touch(self, row: int, positions: np.ndarray) -> None:
        rank = self.rank[row]
        rank[positions] = np.minimum(rank[positions], TOP - ONE) + ONE

    def age(self) -> None:
        self.rank -= self.rank >> 3


class LastUse(SharedHits):
    """The control `lru`: a layer's tokens by when a step last selected them."""

    shared = False
    dtype = np.uint32

    def touch(self, row: int, positions: np.ndarray) -> None:
        self.steps += 1
        self.rank[row, positions] = self.steps

    def age(self) -> None: ...


PLACEMENTS: dict[str, type[SharedHits]] = {
    "hits": LayerHits,
    "shared-hits": SharedHits,
    "lru": LastUse,
}
