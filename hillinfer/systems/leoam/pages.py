"""Pages of a chunk index: on the drive beside the records, the last used of them in memory (LeoAM's KV abstracts)."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from hillinfer.growable import Growable
from hillinfer.tiers.block_file import BLOCK, BlockFile, aligned


class Pages:
    """int8 pages of one shape of one stream. Without a drive all are in memory; with one, at most `capacity` are,
    and as many for a moment beside them."""

    def __init__(self, shape: tuple, drive: BlockFile | None = None, stream: int = 0, capacity: int | None = None):
        self.shape, self.drive, self.stream = shape, drive, stream
        self.capacity = None if drive is None or capacity is None else max(1, capacity)
        self.n = self.uses = 0
        self.kept = Growable((0, *shape), 0, torch.int8)
        self.page_of = np.zeros(0, np.int64)  # slot -> page
        self.slot_of = np.zeros(0, np.int64)  # page -> slot, or -1
        self.used = np.zeros(0, np.int64)  # slot -> when last
        self.offsets = np.zeros(0, np.int64)  # page -> byte offset in the drive's file
        self.free: list[int] = []  # offsets of pages that were forgotten
        self.work: list[tuple] = []  # (lane, kind, start_ns, end_ns, bytes), for `Step.work`
        self.bytes_read = 0

    @property
    def page_bytes(self) -> int:
        return int(np.prod(self.shape))

    def append(self, pages: torch.Tensor) -> None:
        """Further pages (p, *shape)."""
        new = np.arange(self.n, self.n + len(pages))
        self.n += len(pages)
        self.slot_of = np.append(self.slot_of, np.full(len(new), -1))
        if self.drive is not None:
            self._write(pages, int(new[0]))
        room = len(new) if self.capacity is None else min(len(new), self.capacity)
        self._keep(new[-room:], pages[-room:])

    def take(self, page: np.ndarray, part: np.ndarray) -> torch.Tensor:
        """Parts [page, part] of pages, (m, *shape[1:])."""
        out = torch.empty((len(page), *self.shape[1:]), dtype=torch.int8)
        for which, data, index in self.groups(page):
            out[torch.from_numpy(which)] = data[torch.from_numpy(index), torch.from_numpy(part[which])]
        return out

    def groups(self, page: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
        """Have pages (m,) in memory, group by group: which of the m, data (p, *shape), which of p each of them is.

        One group where all fit. Where they do not, what is here stays, and the others pass through a buffer: to evict
        for them would leave none of those that the next search asks for first.
        """
        wanted = np.flatnonzero(np.bincount(page, minlength=1))
        if self.capacity is None or len(wanted) <= self.capacity:
            self._bring(wanted)
            yield np.arange(len(page)), self.kept.data, self.slot_of[page]
            return
        missing = wanted[self.slot_of[wanted] < 0]
        free = self.capacity - int((self.page_of >= 0).sum())
        self._bring(missing[:free])
        here = np.flatnonzero(self.slot_of[page] >= 0)
        yield here, self.kept.data, self.slot_of[page[here]]
        for at in range(free, len(missing), self.capacity):
            some = missing[at : at + self.capacity]
            which = np.flatnonzero(np.isin(page, some, kind="table"))
            yield which, self._read(some), np.searchsorted(some, page[which])

    def _bring(self, pages: np.ndarray) -> None:
        """Have these in memory: no more than there is room for."""
        self.uses += 1
        slots = self.slot_of[pages]
        self.used[slots[slots >= 0]] = self.uses
        if len(missing := pages[slots < 0]):
            self._keep(missing, self._read(missing))

    def truncate(self, n: int) -> None:
        """Forget all pages from n on."""
        slots = np.flatnonzero(self.page_of >= n)
        self.page_of[slots], self.used[slots] = -1, -1
        self.free += self.offsets[n:].tolist()
        self.n, self.slot_of, self.offsets = n, self.slot_of[:n], self.offsets[:n]

    def _read(self, pages: np.ndarray) -> torch.Tensor:
        """From the drive, (p, *shape)."""
        start, width = time.perf_counter_ns(), -(-self.page_bytes // BLOCK) * BLOCK
        buffer = aligned(width * len(pages)).reshape(len(pages), width)
        jobs = [(int(at), part) for at, part in zip(self.offsets[pages], buffer, strict=True)]
        self.drive.transfer("read", jobs, self.stream, int(pages[0]))
        self.bytes_read += buffer.nbytes
        self.work.append(("drive", "abstract", start, time.perf_counter_ns(), buffer.nbytes))
        return torch.from_numpy(buffer[:, : self.page_bytes].view(np.int8)).view(-1, *self.shape)

    def _write(self, pages: torch.Tensor, first: int) -> None:
        width = -(-self.page_bytes // BLOCK) * BLOCK
        reused = [self.free.pop() for _ in range(min(len(self.free), len(pages)))]
        fresh = len(pages) - len(reused)
        base = self.drive.allocate(width * fresh) if fresh else 0
        offsets = reused + [base + i * width for i in range(fresh)]
        self.offsets = np.append(self.offsets, np.array(offsets, np.int64))
        buffer = aligned(width * len(pages)).reshape(len(pages), width)
        buffer[:, : self.page_bytes] = pages.contiguous().view(torch.uint8).reshape(len(pages), -1).numpy()
        self.drive.transfer("write", list(zip(offsets, buffer, strict=True)), self.stream, first)

    def _keep(self, pages: np.ndarray, data: torch.Tensor) -> None:
        """Have these pages in memory, in place of the least recently used where there is no room."""
        more = len(pages) if self.capacity is None else min(len(pages), self.capacity - len(self.page_of))
        more -= int((self.page_of < 0).sum()) if self.capacity is None else 0
        if more > 0:
            self.kept.reserve(self.kept.n + more)
            self.kept.n += more
            self.page_of, self.used = (
                np.append(self.page_of, np.full(more, -1)),
                np.append(self.used, np.full(more, -1)),
            )
        slots = np.argsort(self.used, kind="stable")[: len(pages)]
        old = self.page_of[slots]
        self.slot_of[old[old >= 0]] = -1
        self.kept.view()[torch.from_numpy(slots)] = data
        self.page_of[slots], self.slot_of[pages], self.used[slots] = pages, slots, self.uses

    @property
    def nbytes(self) -> int:
        """In memory."""
        return self.kept.data.nbytes
