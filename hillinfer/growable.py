"""A tensor that grows along one dimension."""

import ctypes
import mmap

import torch

LARGE = 8 << 20  # minimum bytes of a buffer for huge pages


class Growable:
    """A buffer with spare capacity; `view()` is the filled part.

    The capacity grows by an eighth, at least 256: appends are amortised O(1), with about 12 % waste. `DynamicCache`
    copies all of its data at every step instead.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device="cpu"):
        self.dim, self.n = dim, 0
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            self.data = torch.empty(shape, dtype=dtype, device=device)

    def view(self) -> torch.Tensor:
        return self.data.narrow(self.dim, 0, self.n)

    def reserve(self, size: int) -> None:
        """Grow the capacity to exactly `size`; never shrinks."""
        if size > self.data.shape[self.dim]:
            shape = list(self.data.shape)
            shape[self.dim] = size
            with torch.inference_mode(False):
                grown = torch.empty(shape, dtype=self.data.dtype, device=self.data.device)
            _advise_huge_pages(grown)
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

    def reorder(self, rows: torch.Tensor) -> None:
        """Select these rows of dimension 0, in this order."""
        rows = rows.to(self.data.device)
        with torch.inference_mode(False):
            self.data = self.data.index_select(0, rows.clone())


def _advise_huge_pages(data: torch.Tensor) -> None:
    """Request huge pages before first use: attention to records scattered over 4 KiB pages takes 1.5 times as long.

    No effect without transparent huge pages (Linux).
    """
    if data.device.type == "cpu" and data.nbytes >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-data.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = data.data_ptr() + data.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
