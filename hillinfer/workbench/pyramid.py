"""Attention over every position of a long text, summed over steps in bounded memory and read as tiles of any zoom."""

import numpy as np

TILE = 512  # cells of a tile
LAYERS, HEADS, PICKED = 20_000_000, 18_000_000, 26_000_000  # bytes of the three grids, 64 MB together
MOST = 65_535  # of a uint16: counts stop there
TIERS = ("device", "host", "drive")  # the order of the codes; 3: not recorded
EVEN, DECADE = 97, 32  # code of an even share of the attention; codes a decade


class Grid:
    """Sums over positions by row, in at most `limit` bytes: where more would be needed, blocks of positions double."""

    def __init__(self, limit: int, dtype: type):
        self.limit, self.dtype, self.level, self.n = limit, dtype, 0, 0  # a block is 2**level positions
        self.rows: dict[tuple[int, int], np.ndarray] = {}

    def add(self, row: tuple[int, int], positions: np.ndarray | None, values: np.ndarray, n: int) -> None:
        """Add values (k,) at sorted, distinct positions (k,) of n; positions None: all n."""
        own = self._row(row, n)
        if positions is None:
            sums = np.add.reduceat(values, np.arange(0, n, 1 << self.level)) if self.level else values
            own[: len(sums)] += sums.astype(self.dtype, copy=False)
        elif self.level:
            np.add.at(own, positions >> self.level, values.astype(self.dtype, copy=False))
        else:  # distinct cells: several times as fast
            own[positions] += values.astype(self.dtype, copy=False)

    def _row(self, row: tuple[int, int], n: int) -> np.ndarray:
        """The row's sums, long enough for n positions, once everything fits in the limit."""
        self.n = max(self.n, n)
        count = len(self.rows) + (row not in self.rows)
        while count * self._cells() * np.dtype(self.dtype).itemsize > self.limit:
            self.level += 1
            for key, old in self.rows.items():
                pairs = np.pad(old, (0, len(old) % 2)).reshape(-1, 2).sum(1, dtype=np.float64)
                self.rows[key] = np.minimum(pairs, MOST if self.dtype is np.uint16 else np.inf).astype(self.dtype)
        own = self.rows.setdefault(row, np.zeros(0, self.dtype))
        if len(own) < self._cells():
            own = self.rows[row] = np.pad(own, (0, self._cells() - len(own)))
        return own

    def _cells(self) -> int:
        return -(-self.n // 1024 * 1024 >> self.level)  # a text grows in steps of 1,024 positions

    def cells(self, row: tuple[int, int], level: int, index: int) -> np.ndarray:
        """Sums (TILE,) over blocks of 2**level positions, those of tile `index`; level at least that of the grid."""
        more = 1 << level - self.level
        own = self.rows.get(row, np.zeros(0, self.dtype))[index * TILE * more : (index + 1) * TILE * more]
        return np.pad(own, (0, TILE * more - len(own))).reshape(TILE, more).sum(1, dtype=np.float64)

    @property
    def nbytes(self) -> int:
        return sum(own.nbytes for own in self.rows.values())


class AttentionMap:
    """Attention by layer, head and position, mean over the steps added, and the selected positions with their tiers.

    Each layer's mean over its heads is kept by token, single heads in blocks that fit (32 tokens at 128K tokens, 32
    layers and 32 heads); together at most 64 MB. An `AttentionRecord` fills it, or `add` from arrays.
    """

    def __init__(self):
        self.n = self.steps = self.version = 0
        self.layers, self.heads = Grid(LAYERS, np.float32), Grid(HEADS, np.float32)
        self.picked = Grid(PICKED, np.uint16)  # rows: layer and tier
        self.seen: dict[int, int] = {}  # heads added by layer, over all steps
        self.picks: dict[int, int] = {}  # selections added by layer
        self.counts: dict[int, int] = {}  # heads of a layer
        self._last = None, None, 0  # step, layer, and heads of it so far

    def add(
        self,
        layer: int,
        weights: np.ndarray,
        positions: np.ndarray | None = None,
        picked: np.ndarray | None = None,
        tiers: np.ndarray | None = None,
        step: int | None = None,
    ) -> None:
        """Add one layer's attention of one step. Heads that select apart come one after another, with the same `step`.

        weights    (H, n) over all positions, or (H, k) over `positions`, sorted (k,)
        picked     the selected positions, sorted (m,); None if everything is attended to
        tiers      where these lay, uint8 (m,), codes of TIERS
        """
        known, at, first = self._last
        first = first if step is not None and (known, at) == (step, layer) else 0
        n = weights.shape[1] if positions is None else int(positions[-1]) + 1
        self.n, self._last, self.version = max(self.n, n), (step, layer, first + len(weights)), self.version + 1
        self.layers.add((layer, 0), positions, weights.sum(0), n)
        for head, own in enumerate(weights, first):
            self.heads.add((layer, head), positions, own, n)
        self.seen[layer] = self.seen.get(layer, 0) + len(weights)
        self.counts[layer] = max(self.counts.get(layer, 0), first + len(weights))
        self.steps = max(self.steps, self.seen[layer] // self.counts[layer])
        if picked is not None and self.picks.get(layer, 0) < MOST >> self.picked.level:
            self.picks[layer] = self.picks.get(layer, 0) + 1
            tiers = np.full(len(picked), 3, np.uint8) if tiers is None else tiers
            for tier in np.unique(tiers):
                own = picked[tiers == tier]
                self.picked.add((layer, int(tier)), own, np.ones(len(own), np.uint16), n)

    def rows_of(self, layer: int | None) -> list[tuple[int, int]]:
        """The rows of a view: all layers, or one layer's heads."""
        if layer is None:
            return [(one, 0) for one in sorted(self.seen)]
        return [(layer, head) for head in range(self.counts[layer])]

    def level_of(self, layer: int | None) -> int:
        """The finest level of a view: 2**level positions are one cell."""
        return (self.layers if layer is None else self.heads).level

    def top(self) -> int:
        """The level whose single tile holds all positions, at least that of every view."""
        least = max(self.layers.level, self.heads.level, self.picked.level)
        return max(least, (max(1, -(-self.n // TILE)) - 1).bit_length())

    def tile(self, layer: int | None, level: int, index: int) -> np.ndarray:
        """uint8 (rows, TILE, 2) of `rows_of(layer)`: attention and selection in cells of 2**level positions.

        The first is 0 without attention, else EVEN + DECADE * log10(attention over an even share). The second is 64
        times the tier that served most of the selected, plus their share of the cell, in 1/63.
        """
        rows, first = self.rows_of(layer), index * TILE << level
        tokens = np.clip(self.n - first - (np.arange(TILE) << level), 1, 1 << level)
        out, grid = np.zeros((len(rows), TILE, 2), np.uint8), self.layers if layer is None else self.heads
        for i, row in enumerate(rows):
            added = self.seen[row[0]] / (1 if layer is None else self.counts[row[0]])
            ratio = grid.cells(row, level, index) / (added * tokens) * self.n
            with np.errstate(divide="ignore"):
                code = np.clip(np.round(EVEN + DECADE * np.log10(ratio)), 1, 255)
            out[i, :, 0] = np.where(ratio > 0, code, 0)
            if layer is None or i == 0:
                chosen = self._selected(row[0], level, index, tokens)
            out[i, :, 1] = chosen  # a layer's heads are shown what is selected for any of them
        return out

    def _selected(self, layer: int, level: int, index: int, tokens: np.ndarray) -> np.ndarray:
        if layer not in self.picks:
            return np.zeros(TILE, np.uint8)
        coarse = max(level, self.picked.level)
        more = coarse - level
        counts = np.stack([self.picked.cells((layer, tier), coarse, index >> more) for tier in range(4)])
        if more:
            first = index % (1 << more) * TILE
            counts = counts[:, first + np.arange(TILE) >> more] / (1 << more)  # spread evenly over finer cells
        share = np.ceil(63 * np.minimum(1, counts.sum(0) / (self.picks[layer] * tokens)))
        return (counts.argmax(0) << 6 | share.astype(np.int64)).astype(np.uint8)

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes + self.heads.nbytes + self.picked.nbytes
