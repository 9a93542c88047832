"""Rank of tokens in the hot pool: hit counters, and last use as a control.

The paper (HillInfer section 1.3) has one 16-bit counter per token, 2N bytes in total, without ageing. Measured on the
embedded model (docs/experiments.md), layers select different tokens and formerly popular ones clog the pool: counters
per layer that decay by an eighth at every step read fewer bytes from the drive. Both are implemented.
"""

import numpy as np

ONE = 256  # one hit, in fixed point
TOP = 65_535


class SharedHits:
    """The paper's table: one counter per token for all layers, halved every 64 steps.

    `rank[row]` is an array over tokens; the pool keeps the tokens of highest rank.
    """

    shared = True
    dtype = np.uint16

    def __init__(self, batch: int):
        self.rank = np.zeros((batch, 0), self.dtype)
        self.n = self.steps = 0

    def extend(self, n: int) -> None:
        """Cover tokens up to n."""
        if n > self.rank.shape[1]:
            self.rank = np.pad(self.rank, ((0, 0), (0, n + max(256, n // 8) - self.rank.shape[1])))
        self.n = max(self.n, n)

    def touch(self, row: int, positions: np.ndarray) -> None:
        """Count a hit of these tokens. Counters saturate."""
        rank = self.rank[row]
        rank[positions] += rank[positions] < TOP

    def age(self) -> None:
        """Age the counters at the end of a step."""
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
    """Counters per layer, 2N bytes each: a hit adds ONE, every step subtracts an eighth."""

    shared = False

    def touch(self, row: int, positions: np.ndarray) -> None:
        rank = self.rank[row]
        rank[positions] = np.minimum(rank[positions], TOP - ONE) + ONE

    def age(self) -> None:
        self.rank -= self.rank >> 3


class LastUse(SharedHits):
    """The control `lru`: tokens of a layer by the last step that selected them."""

    shared = False
    dtype = np.uint32

    def touch(self, row: int, positions: np.ndarray) -> None:
        self.steps += 1
        self.rank[row, positions] = self.steps

    def age(self) -> None: ...


PLACEMENTS: dict[str, type[SharedHits]] = {"hits": LayerHits, "shared-hits": SharedHits, "lru": LastUse}
