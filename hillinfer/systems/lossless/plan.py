"""Which tensor is bound to which path (DUAL-BLADE, arXiv 2604.26557)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

NEAR, DIRECT = "near", "direct"
SPANS = {NEAR: ("cpu", "near"), DIRECT: ("drive", "prefetch")}  # lane and kind of reads from each path


@dataclass(frozen=True)
class Extent:
    """Blocks first .. first+count of a tensor are stored in blocks start .. start+count of its path."""

    path: str  # NEAR or DIRECT
    start: int
    first: int
    count: int


class Plan:
    """The extents of each tensor: the first tensors are near until the budget is full, the others direct.

    A tensor is one layer's K or V, in the order K0, V0, K1, ... Bindings are permanent: the paper binds once, at the
    start; here each growth step applies the same rule to the rest of the budget. The direct tensors of a step are
    adjacent, so that with a known maximum length each tensor is one contiguous extent.
    """

    def __init__(self, tensors: int, budget: int, allocate: Callable[[str, int], int]):
        """allocate(path, blocks) returns the first block of a new region of that path; `budget` is in blocks."""
        self.budget, self.allocate = budget, allocate
        self.extents: list[list[Extent]] = [[] for _ in range(tensors)]
        self.bound = {NEAR: 0, DIRECT: 0}  # blocks
        self.blocks = 0  # of each tensor

    def extend(self, blocks: int) -> None:
        """Add this many blocks to every tensor."""
        near = min(len(self.extents), max(0, self.budget - self.bound[NEAR]) // blocks)
        for path, tensors in ((NEAR, self.extents[:near]), (DIRECT, self.extents[near:])):
            if tensors:
                base = self.allocate(path, blocks * len(tensors))
                self.bound[path] += blocks * len(tensors)
                for i, extents in enumerate(tensors):
                    extents.append(Extent(path, base + i * blocks, self.blocks, blocks))
        self.blocks += blocks

    def spans(self, tensor: int, start: int, end: int, block: int) -> Iterator[tuple[str, int, int, int]]:
        """Bytes start..end of a tensor as (path, offset on the path, start, end), split at extent boundaries."""
        for extent in self.extents[tensor]:
            first, last = extent.first * block, (extent.first + extent.count) * block
            low, high = max(start, first), min(end, last)
            if low < high:
                yield extent.path, extent.start * block + low - first, low, high
