"""How much page cache a run may count on, and which tensor goes where (DUAL-BLADE, arXiv 2604.26557)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NEAR, DIRECT = "near", "direct"
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True)
class Memory:
    """A limit and what already counts against it, in bytes."""

    limit: int
    anonymous: int
    shmem: int
    source: str

    def budget(self, pinned: int = 0) -> int:
        """Bytes left for the page cache beside `pinned` bytes of transfer buffers that are not allocated yet."""
        return max(0, self.limit - self.anonymous - self.shmem - pinned)


def read_memory(root: Path = Path("/")) -> Memory:
    """The tightest limit on this process: its memory cgroup (v1 or v2), one above it, or the machine.

    root   where /proc and /sys are found; tests give a folder of their own
    """
    available = _fields(root / "proc/meminfo")["MemAvailable"] * 1024
    found = [Memory(available, 0, 0, "the machine's available memory")]
    for version, group in _groups(root):
        limit_file, kinds = {
            "cgroup v1": ("memory.limit_in_bytes", ("total_rss", "total_shmem")),
            "cgroup v2": ("memory.max", ("anon", "shmem")),
        }[version]
        try:
            limit, stat = (group / limit_file).read_text().strip(), _fields(group / "memory.stat")
        except OSError:
            continue  # the root group of v2 has neither
        if limit != "max" and int(limit) < NO_LIMIT:
            found.append(Memory(int(limit), stat[kinds[0]], stat[kinds[1]], f"{version} {group.name}"))
    return min(found, key=Memory.budget)


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """This process's memory cgroup and those above it, as (version, folder)."""
    mounts = {}
    for line in (root / "proc/self/mounts").read_text().splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup2":
            mounts["cgroup v2"] = folder
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts["cgroup v1"] = folder
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        version = "cgroup v1" if "memory" in controllers.split(",") else None if controllers else "cgroup v2"
        if version not in mounts:
            continue
        mount = root / mounts[version].lstrip("/")
        group = mount / path.lstrip("/")
        if not group.is_dir():
            group = mount  # seen from inside a container, the path is the host's and the mount is ours
        while group != mount.parent:
            yield version, group
            group = group.parent


def _fields(path: Path) -> dict[str, int]:
    """Lines of `name number` or `name: number kB`."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


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
