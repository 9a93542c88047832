"""Whole K and V tensors on the drive, streamed at every step by the lossless systems.

FlexGen (arXiv 2303.06865) streams all KV and prefetches the next layer; DUAL-BLADE (arXiv 2604.26557) binds some
tensors to the page cache and the others to a direct path. Both are a `Plan` over two paths and `Slots` to load through.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from hillinfer.growable import aligned
from hillinfer.systems.lossless.plan import NEAR, Plan
from hillinfer.systems.lossless.slots import Slots
from hillinfer.tiers.block_file import BLOCK, BlockFile, pieces
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import BEHIND, Writer

HELD = 16 * BLOCK  # bytes of a tensor's tail that make a write
HEADROOM = 256  # tokens of space reserved beyond the first append without `max_tokens`


class HostPath:
    """Host memory as a path, for the tensors that FlexGen keeps resident; `transfer` as in `BlockFile`."""

    about, direct = "host memory", False

    def __init__(self):
        self.regions: list[tuple[int, np.ndarray]] = []  # (offset, bytes)
        self.size = 0

    def allocate(self, nbytes: int) -> int:
        self.regions.append((self.size, aligned(nbytes)))
        self.size += nbytes
        return self.size - nbytes

    def at(self, offset: int, nbytes: int) -> np.ndarray:
        base, region = next(r for r in reversed(self.regions) if r[0] <= offset)
        return region[offset - base : offset - base + nbytes]

    def transfer(self, verb: str, jobs: list[tuple[int, np.ndarray]], *_) -> None:
        for offset, buffer in jobs:
            stored = self.at(offset, len(buffer))
            source, target = (stored, buffer) if verb == "read" else (buffer, stored)
            target[:] = source

    def trim(self) -> None:
        self.regions.clear()

    close = trim


class Tensor:
    """One layer's K or V, (N, B, Hkv, D), as bytes: the first `flushed` are on their path, the others in `tail`."""

    def __init__(self, index: int):
        self.index, self.layer = index, index // 2
        self.flushed, self.tail = 0, np.empty(0, np.uint8)
        self.writing: Future | None = None

    def settle(self) -> None:
        """Wait for the write in flight and raise its error, if any. Thread-safe."""
        if writing := self.writing:
            writing.result()


@dataclass(eq=False)
class Tensors:
    """The K and V tensors of all layers of one cache, in the order K0, V0, K1, ...

    paths       the near and the direct one, by the plan's names
    budget      bytes for the near path, given the bytes of the buffers yet to be allocated
    max_tokens  length to reserve space for, so that each tensor is one extent. Without it, space for the first append
                and HEADROOM tokens; when full, it doubles by another extent per tensor, and nothing moves
    staggered   asked at each load: True for the cross-path pipeline, False for the intra-path one (see `Slots`)
    prefetch    load the next layer while one computes
    """

    geometry: Geometry
    layers: int
    paths: dict[str, BlockFile | HostPath]
    budget: Callable[[int], int]
    max_tokens: int | None = None
    staggered: Callable[[], bool] = lambda: False
    prefetch: bool = True

    def __post_init__(self):
        self.token_bytes = self.geometry.batch * self.geometry.record_bytes // 2  # of one tensor
        self.tensors = [Tensor(i) for i in range(2 * self.layers)]
        self.plan: Plan | None = None
        self.slots = Slots(self, self.staggered, self.prefetch)
        self._writer = Writer(0)  # its limit is set by the first append

    @property
    def size(self) -> int:
        """Bytes reserved on the drive."""
        return sum(path.size for path in self.paths.values() if isinstance(path, BlockFile))

    @property
    def bytes(self) -> int:
        """Bytes reserved for each tensor."""
        return self.plan.blocks * BLOCK if self.plan else 0

    def pair(self, layer: int) -> list[Tensor]:
        """The layer's K and V."""
        return self.tensors[2 * layer : 2 * layer + 2]

    def reserve(self, tokens: int) -> None:
        """Reserve space for `tokens` tokens in every tensor. DriveError if a path is full."""
        need = -(-tokens * self.token_bytes // BLOCK)
        if self.plan is None:
            need = -(-max(tokens, self.max_tokens or tokens + HEADROOM) * self.token_bytes // BLOCK)
            self._writer.behind = min(BEHIND, need * BLOCK)
            buffers = Slots.COUNT * 2 * need * BLOCK + len(self.tensors) * HELD
            budget = self.budget(buffers + 2 * self._writer.behind)  # twice: a write may need an aligned copy
            self.plan = Plan(len(self.tensors), budget // BLOCK, self._allocate)
            self.plan.extend(need)
        elif need > self.plan.blocks:
            self.slots.drop()
            self.plan.extend(max(need - self.plan.blocks, self.plan.blocks))

    def append(self, layer: int, kv: torch.Tensor, n: int) -> int:
        """Add kv (B, m, 2, Hkv, D) after n tokens; returns the bytes of the writes started."""
        self.reserve(n + kv.shape[1])
        kv = kv.permute(2, 1, 0, 3, 4)  # (2, m, B, Hkv, D)
        both = aligned(kv.nbytes)  # spares a write of whole blocks a copy
        torch.from_numpy(both).view(kv.dtype).view(kv.shape).copy_(kv)
        return sum(map(self._append, self.pair(layer), both.reshape(2, -1)))

    def resident(self, layer: int, n: int) -> torch.Tensor | None:
        """A view of the layer's n tokens in host memory, (B, n, 2, Hkv, D); None if it is not resident."""
        if not self.is_resident(layer):
            return None
        start = self.plan.extents[2 * layer][0].start * BLOCK
        return self.view(torch.from_numpy(self.paths[NEAR].at(start, 2 * self.bytes).reshape(2, -1)), n)

    def is_resident(self, layer: int) -> bool:
        """True if the layer lies contiguously in host memory, K before V."""
        if not isinstance(self.paths[NEAR], HostPath):
            return False
        pair = [extent for tensor in self.pair(layer) for extent in self.plan.extents[tensor.index]]
        return len(pair) == 2 and all(extent.path == NEAR for extent in pair)

    def truncate(self, layer: int, n: int) -> None:
        """Forget the layer's tokens from n on. The block that n falls into is read back into the tail."""
        end = n * self.token_bytes
        for tensor in self.pair(layer):
            tensor.settle()
            if end < tensor.flushed:
                tensor.flushed, block = end // BLOCK * BLOCK, aligned(BLOCK)
                self.read(tensor, tensor.flushed, tensor.flushed + BLOCK, block)
                tensor.tail = block.copy()
            tensor.tail = tensor.tail[: end - tensor.flushed]
        self.slots.truncate(layer)

    def read(self, tensor: Tensor, start: int, end: int, out: np.ndarray, share: float = 1) -> dict[str, int]:
        """Read bytes start..end of a tensor into `out`, page-aligned. Returns the bytes read from each path.

        share  see `BlockFile.transfer`
        """
        nbytes = Counter()
        for path, offset, low, high in self.plan.spans(tensor.index, start, end, BLOCK):
            jobs = pieces(offset, out[low - start : high - start])

            def token(at: int, low: int = low, offset: int = offset) -> int:
                return (low + max(0, at - offset)) // self.token_bytes

            self.paths[path].transfer("read", jobs, tensor.layer, token, share)
            nbytes[path] += high - low
        return nbytes

    def view(self, both: torch.Tensor, n: int) -> torch.Tensor:
        """(2, bytes) as the first n tokens, (B, n, 2, Hkv, D)."""
        size = self.geometry
        shape = (2, n, size.batch, size.kv_heads, size.head_dim)
        return both[:, : n * self.token_bytes].view(size.dtype).view(shape).permute(2, 1, 0, 3, 4)

    def memory(self, layer: int) -> dict[str, int]:
        """Bytes in memory for one layer: tails and near tensors. The first layer includes all transfer buffers."""
        device, host = self.slots.nbytes if layer == 0 else (0, 0)
        host += sum(tensor.tail.nbytes for tensor in self.pair(layer))
        near = sum(e.count * BLOCK for t in self.pair(layer) for e in self.plan.extents[t.index] if e.path == NEAR)
        resident = isinstance(self.paths[NEAR], HostPath)
        return {"device": device, "host": host + near * resident, "page_cache": near * (not resident)}

    def close(self) -> None:
        """Stop the threads, then free all space."""
        self.slots.close()
        self._writer.close()
        for path in self.paths.values():
            path.trim()
            path.close()

    def _allocate(self, path: str, blocks: int) -> int:
        return self.paths[path].allocate(blocks * BLOCK) // BLOCK

    def _append(self, tensor: Tensor, new: np.ndarray) -> int:
        """Add bytes; returns how many begin to be written to a drive: whole blocks, once the tail has HELD bytes."""
        tail = np.concatenate((tensor.tail, new)) if len(tensor.tail) else new
        resident, start = self.is_resident(tensor.layer), tensor.flushed
        nbytes = len(tail) if resident else 0
        if not resident and len(tail) >= HELD:
            nbytes = (start + len(tail)) // BLOCK * BLOCK - start
        tensor.flushed, tensor.tail = start + nbytes, tail[nbytes:].copy()
        if not nbytes:
            return 0
        tensor.settle()
        if resident:
            self._write(tensor, start, tail)
            return 0
        tensor.writing = self._writer.submit(nbytes, lambda: self._write(tensor, start, tail[:nbytes]))
        return nbytes

    def _write(self, tensor: Tensor, start: int, data: np.ndarray) -> None:
        for path, offset, low, high in self.plan.spans(tensor.index, start, start + len(data), BLOCK):
            part = data[low - start : high - start]
            if self.paths[path].direct and part.ctypes.data % BLOCK:
                part = aligned(len(part))
                part[:] = data[low - start : high - start]
            self.paths[path].transfer("write", pieces(offset, part), tensor.layer, start // self.token_bytes)
