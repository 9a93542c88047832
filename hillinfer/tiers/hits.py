"""What the hot pool ranks tokens by: HillInfer's hit table, and two controls with the same face."""

import numpy as np

AGE_STEPS = 64  # counts are halved this often, so that old favourites make room; our choice, the paper gives none


class HitTable:
    """How often each token was selected (HillInfer section 1.3): a 16-bit counter for each, 2N bytes for all layers.

    `rank[row]` is an array over tokens: what is higher stays in the pool.
    """

    shared = True
    dtype = np.uint16

    def __init__(self, batch: int):
        self.rank = np.zeros((batch, 0), self.dtype)
        self.n = 0

    def extend(self, n: int) -> None:
        """Cover tokens up to n."""
        if n > self.rank.shape[1]:
            grown = np.zeros((len(self.rank), n + max(256, n // 8)), self.dtype)
            grown[:, : self.rank.shape[1]] = self.rank
            self.rank = grown
        self.n = max(self.n, n)

    def touch(self, row: int, positions: np.ndarray) -> None:
        """Take note that a step selected these tokens; counters stop at 65,535."""
        rank = self.rank[row]
        rank[positions] += rank[positions] < np.iinfo(np.uint16).max

    def age(self) -> None:
        """Called every AGE_STEPS steps."""
        self.rank >>= 1

    def truncate(self, n: int) -> None:
        self.rank[:, n:] = 0
        self.n = min(self.n, n)

    @property
    def nbytes(self) -> int:
        return self.rank.itemsize * self.n * len(self.rank)


class LastUse(HitTable):
    """The control `lru`: a layer's tokens by when a step last selected them."""

    shared = False
    dtype = np.uint32

    def __init__(self, batch: int):
        super().__init__(batch)
        self.clock = 0

    def touch(self, row: int, positions: np.ndarray) -> None:
        self.clock += 1
        self.rank[row, positions] = self.clock

    def age(self) -> None: ...


class LatestOnly(HitTable):
    """The control `importance`: a layer keeps what is important right now and forgets what was."""

    shared = False
    dtype = np.uint8

    def touch(self, row: int, positions: np.ndarray) -> None:
        self.rank[row] = 0
        self.rank[row, positions] = 1

    def age(self) -> None: ...


PLACEMENTS: dict[str, type[HitTable]] = {"hits": HitTable, "lru": LastUse, "importance": LatestOnly}
