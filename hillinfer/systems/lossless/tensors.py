"""Whole K and V tensors on their paths: what the lossless systems keep on the drive and stream at every step.

FlexGen (arXiv 2303.06865) streams all KV, with the next layer prefetched; DUAL-BLADE (arXiv 2604.26557) binds some
tensors to the page cache and the rest to a direct path. Both are a `Plan` over two paths, and `Slots` to pass through.
"""

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch

from hillinfer.systems.lossless.plan import DIRECT, NEAR, Plan
from hillinfer.systems.lossless.slots import Slots
from hillinfer.tiers.block_file import BLOCK, BlockFile, aligned, pieces
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import BEHIND, Writer

HELD = 16 * BLOCK  # bytes of a tensor gathered before they are written
HEADROOM = 256  # tokens of room beyond the first ones, where no maximal length is given


class HostPath:
    """A path that is host memory: what FlexGen keeps resident. Same contract as `BlockFile.transfer`."""

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
            here = self.at(offset, len(buffer))
            if verb == "read":
                buffer[:] = here
            else:
                here[:] = buffer

    def trim(self) -> None:
        self.regions.clear()

    close = trim


class Tensor:
    """One layer's K or V, (N, B, Hkv, D), as a string of bytes: `flushed` are on their paths, the rest in `tail`."""

    def __init__(self, index: int):
        self.index, self.layer = index, index // 2
        self.flushed, self.tail = 0, np.empty(0, np.uint8)
        self.writing: Future | None = None

    def settle(self) -> None:
        """Wait for the write under way. Raises what it raised. Any thread may."""
        writing = self.writing
        if writing is not None:
            writing.result()


class Tensors:
    """The K and V tensors of all layers of one cache, in the order K0, V0, K1, ...

    budget      bytes for the near path, given the bytes of buffers that are still to be allocated
    max_tokens  the length to reserve room for, so that each tensor is one extent. Without it the room is the first
                tokens and HEADROOM more, and doubles when it is full: another extent for each tensor, nothing moves
    staggered   asked at each prefetch: True for the cross-path pipeline, False for the intra-path one (see `Slots`)
    prefetch    whether the next layers are read while one computes
    """

    def __init__(
        self,
        geometry: Geometry,
        layers: int,
        near: BlockFile | HostPath,
        direct: BlockFile,
        budget: Callable[[int], int],
        max_tokens: int | None = None,
        staggered: Callable[[], bool] = lambda: False,
        prefetch: bool = True,
    ):
        self.geometry, self.layers, self.paths = geometry, layers, {NEAR: near, DIRECT: direct}
        self.budget, self.max_tokens = budget, max_tokens
        self.token_bytes = geometry.batch * geometry.record_bytes // 2  # of one tensor
        self.tensors = [Tensor(i) for i in range(2 * layers)]
        self.plan: Plan | None = None
        self.slots = Slots(self, staggered, prefetch)
        self._writer = Writer(0)  # its room is known with the first tokens

    @property
    def size(self) -> int:
        """Bytes reserved on the drive."""
        return sum(path.size for path in self.paths.values() if isinstance(path, BlockFile))

    @property
    def bytes(self) -> int:
        """Of one tensor, with its room to grow."""
        return self.plan.blocks * BLOCK if self.plan else 0

    def pair(self, layer: int) -> list[Tensor]:
        """The layer's K and V."""
        return self.tensors[2 * layer : 2 * layer + 2]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every tensor. DriveError when a path is full."""
        need = -(-tokens * self.token_bytes // BLOCK)
        if self.plan is None:
            room = max(tokens, self.max_tokens or tokens + HEADROOM)
            first = -(-room * self.token_bytes // BLOCK)
            self._writer.behind = min(BEHIND, first * BLOCK)
            buffers = Slots.COUNT * 2 * first * BLOCK + len(self.tensors) * HELD
            budget = self.budget(buffers + 2 * self._writer.behind)  # twice, as what is written is copied to be aligned
            self.plan = Plan(len(self.tensors), budget // BLOCK, self._allocate)
            self.plan.extend(first)
        elif need > self.plan.blocks:
            self.slots.drop()
            self.plan.extend(max(need - self.plan.blocks, self.plan.blocks))

    def append(self, layer: int, kv: torch.Tensor, n: int) -> int:
        """Add kv (B, m, 2, Hkv, D) after n tokens; returns the bytes whose write began."""
        self.reserve(n + kv.shape[1])
        both = kv.permute(2, 1, 0, 3, 4).cpu().contiguous().view(torch.uint8).numpy()  # (2, m, B, Hkv, bytes of D)
        return sum(self._append(*one) for one in zip(self.pair(layer), both.reshape(2, -1), strict=True))

    def resident(self, layer: int, n: int) -> torch.Tensor | None:
        """The layer's n tokens, (B, n, 2, Hkv, D), where they lie in host memory: nothing is copied. Else None."""
        if not self.is_resident(layer):
            return None
        start = self.plan.extents[2 * layer][0].start * BLOCK
        return self.view(torch.from_numpy(self.paths[NEAR].at(start, 2 * self.bytes).reshape(2, -1)), n)

    def is_resident(self, layer: int) -> bool:
        """Whether host memory holds the layer in one piece, K before V."""
        if not isinstance(self.paths[NEAR], HostPath):
            return False
        pair = [extent for tensor in self.pair(layer) for extent in self.plan.extents[tensor.index]]
        return len(pair) == 2 and all(extent.path == NEAR for extent in pair)

    def truncate(self, layer: int, n: int) -> None:
        """Forget the layer's tokens from n on. The block that n falls into comes back into memory."""
        end = n * self.token_bytes
        for tensor in self.pair(layer):
            tensor.settle()
            if end < tensor.flushed:
                kept = end if self.is_resident(layer) else end // BLOCK * BLOCK
                block = aligned(BLOCK)
                if kept < end:
                    self.read(tensor, kept, kept + BLOCK, block)
                tensor.flushed, tensor.tail = kept, block[: end - kept].copy()
            tensor.tail = tensor.tail[: end - tensor.flushed]
        self.slots.truncate(layer)

    def read(self, tensor: Tensor, start: int, end: int, out: np.ndarray, share: float = 1) -> dict[str, int]:
        """Bytes start..end of a tensor into out, page-aligned; how many came by each path. See `transfer` for share."""
        brought = {}
        for path, offset, low, high in self.plan.spans(tensor.index, start, end, BLOCK):
            jobs = pieces(offset, out[low - start : high - start])

            def token(at: int, low: int = low, offset: int = offset) -> int:
                return (low + max(0, at - offset)) // self.token_bytes

            self.paths[path].transfer("read", jobs, tensor.layer, token, share)
            brought[path] = brought.get(path, 0) + high - low
        return brought

    def view(self, both: torch.Tensor, n: int) -> torch.Tensor:
        """(2, bytes) as the first n tokens, (B, n, 2, Hkv, D)."""
        size = self.geometry
        shape = (2, n, size.batch, size.kv_heads, size.head_dim)
        return both[:, : n * self.token_bytes].view(size.dtype).view(shape).permute(2, 1, 0, 3, 4)

    def memory(self, layer: int) -> dict[str, int]:
        """Bytes in memory for one layer: what is not written yet, and near; with the first layer, all buffers."""
        device, host = self.slots.nbytes if layer == 0 else (0, 0)
        host += sum(tensor.tail.nbytes for tensor in self.pair(layer))
        near = sum(e.count * BLOCK for t in self.pair(layer) for e in self.plan.extents[t.index] if e.path == NEAR)
        resident = isinstance(self.paths[NEAR], HostPath)
        return {"device": device, "host": host + near * resident, "page_cache": near * (not resident)}

    def close(self) -> None:
        """Stop the threads, then give all space back."""
        self.slots.close()
        self._writer.close()
        for path in self.paths.values():
            path.trim()
            path.close()

    def _allocate(self, path: str, blocks: int) -> int:
        return self.paths[path].allocate(blocks * BLOCK) // BLOCK

    def _append(self, tensor: Tensor, new: np.ndarray) -> int:
        tensor.tail = np.concatenate((tensor.tail, new)) if len(tensor.tail) else new
        resident = self.is_resident(tensor.layer)
        if len(tensor.tail) < HELD and not resident:
            tensor.tail = tensor.tail.copy()
            return 0
        parts, written = [], tensor.flushed
        for path, offset, start, end in self.plan.spans(tensor.index, written, written + len(tensor.tail), BLOCK):
            if not isinstance(self.paths[path], HostPath):
                end = end // BLOCK * BLOCK
            if start < end:
                parts.append((path, offset, tensor.tail[start - written : end - written]))
                tensor.flushed = end
        nbytes = tensor.flushed - written
        tensor.tail = tensor.tail[nbytes:].copy()
        tensor.settle()
        if resident:
            self._write(tensor, written, parts)
        elif nbytes:
            tensor.writing = self._writer.submit(nbytes, lambda: self._write(tensor, written, parts))
        return 0 if resident else nbytes

    def _write(self, tensor: Tensor, at: int, parts: list[tuple[str, int, np.ndarray]]) -> None:
        for path, offset, part in parts:
            if self.paths[path].direct and part.ctypes.data % BLOCK:
                bounce = aligned(len(part))
                bounce[:] = part
                part = bounce
            self.paths[path].transfer("write", pieces(offset, part), tensor.layer, at // self.token_bytes)
