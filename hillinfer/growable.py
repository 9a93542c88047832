"""Memory: aligned buffers, and a tensor that grows along one dimension."""

import ctypes
import math
import mmap

import numpy as np
import torch

LARGE, HUGE = 4 << 20, 2 << 20  # minimum bytes of a buffer for huge pages; bytes of one


def aligned(nbytes: int) -> np.ndarray:
    """A page-aligned uint8 buffer, as O_DIRECT needs. A private mapping: it counts as anonymous memory, not shmem.

    A large one asks for huge pages (Linux): a request of 1 MiB is one segment then and not 256, which more than doubled
    a drive's bandwidth, and attention to scattered records takes two thirds of its time.
    """
    huge, flags = nbytes >= LARGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = np.frombuffer(mmap.mmap(-1, max(nbytes, mmap.PAGESIZE) + huge * HUGE, flags), np.uint8)
    if huge:
        where = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(len(memory))
        ctypes.CDLL(None).madvise(*where, getattr(mmap, "MADV_HUGEPAGE", mmap.MADV_NORMAL))
    return memory[huge * (-memory.ctypes.data % HUGE) :][:nbytes]


@torch.inference_mode(False)  # an inference tensor could not be written to outside of that mode
def empty(shape: list[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An uninitialised tensor; in host memory as `aligned`."""
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(aligned(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


class Growable:
    """A buffer with spare capacity; `view()` is the filled part.

    The capacity grows by an eighth, at least 256: appends are amortised O(1), with about 12 % waste. `DynamicCache`
    copies all of its data at every step instead.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device="cpu"):
        self.dim, self.n, self.data = dim, 0, empty(shape, dtype, device)

    def view(self) -> torch.Tensor:
        return self.data.narrow(self.dim, 0, self.n)

    def reserve(self, size: int) -> None:
        """Grow the capacity to exactly `size`; never shrinks."""
        if size > self.data.shape[self.dim]:
            shape = list(self.data.shape)
            shape[self.dim] = size
            grown = empty(shape, self.data.dtype, self.data.device)
            grown.narrow(self.dim, 0, self.n).copy_(self.view())
            self.data = grown

    def extend(self, more: int) -> int:
        """Extend the view by `more` uninitialised entries for the caller to fill. Returns the index of the first."""
        start, needed = self.n, self.n + more
        if needed > self.data.shape[self.dim]:
            self.reserve(needed + max(256, needed // 8))
        self.n = needed
        return start

    def append(self, new: torch.Tensor) -> None:
        start = self.extend(new.shape[self.dim])
        self.data.narrow(self.dim, start, new.shape[self.dim]).copy_(new)

    def truncate(self, n: int) -> None:
        self.n = min(self.n, n)

    def drop(self, n: int) -> None:
        """Forget the first n entries, and the spare capacity."""
        if n:
            with torch.inference_mode(False):
                self.data = self.data.narrow(self.dim, n, self.n - n).clone()
            self.n -= n

    @torch.inference_mode(False)
    def reorder(self, rows: torch.Tensor) -> None:
        """Select these rows of dimension 0, in this order."""
        self.data = self.data.index_select(0, rows.to(self.data.device).clone())
