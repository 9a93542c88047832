"""Which tensor goes on which path (DUAL-BLADE, arXiv 2604.26557)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

NEAR, DIRECT = "near", "direct"


@dataclass(frozen=True)
class Extent:
    """Blocks first .. first+count of a tensor lie at blocks start .. start+count of its path."""

    path: str  # NEAR or DIRECT
    start: int
    first: int
    count: int


class Plan:
    """tensor -> its extents: the first tensors near until the budget is full, the rest direct.

    A tensor is one layer's K or V, in the order K0, V0, K1, ... Each growth step binds once and for good (the paper
    binds at start and moves nothing later): the same rule on what is left of the budget. In each step the direct
    tensors lie back to back in one region, so that given a maximal length a tensor is one contiguous extent.
    """

    def __init__(self, tensors: int, budget: int, allocate: Callable[[str, int], int]):
        """allocate(path, blocks) -> first block of a fresh region of that path."""
        self.budget, self.allocate = budget, allocate  # blocks
        self.extents: list[list[Extent]] = [[] for _ in range(tensors)]
        self.bound = {NEAR: 0, DIRECT: 0}  # blocks
        self.blocks = 0  # of each tensor

    def extend(self, blocks: int) -> None:
        """Give every tensor that many more blocks."""
        near = min(len(self.extents), max(0, self.budget - self.bound[NEAR]) // blocks)
        for path, tensors in ((NEAR, self.extents[:near]), (DIRECT, self.extents[near:])):
            if tensors:
                base = self.allocate(path, blocks * len(tensors))
                self.bound[path] += blocks * len(tensors)
                for i, extents in enumerate(tensors):
                    extents.append(Extent(path, base + i * blocks, self.blocks, blocks))
        self.blocks += blocks

    def spans(self, tensor: int, start: int, end: int, block: int) -> Iterator[tuple[str, int, int, int]]:
        """Bytes start..end of a tensor as (path, offset on the path, start, end), cut where an extent ends."""
        for extent in self.extents[tensor]:
            first, last = extent.first * block, (extent.first + extent.count) * block
            low, high = max(start, first), min(end, last)
            if low < high:
                yield extent.path, extent.start * block + low - first, low, high
