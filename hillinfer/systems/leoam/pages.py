"""Pages of a chunk index: on the drive beside the records, with an LRU cache in memory (LeoAM's KV abstracts)."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hillinfer.growable import Growable, aligned
from hillinfer.tiers.block_file import BLOCK, BlockFile
from hillinfer.timeline import Track

ABSENT = -1  # slot of a page that is not cached


@dataclass(eq=False)
class Pages:
    """int8 pages of one shape, of one sequence and layer. Without a drive, the cache holds all of them.

    capacity  maximum number of cached pages, if there is a drive; a search may read as many again into a buffer
    track     records reads from the drive as `abstract` spans
    """

    shape: tuple[int, ...]
    drive: BlockFile | None = None
    stream: int = 0
    capacity: int | None = None
    track: Track | None = None

    def __post_init__(self):
        self.page_bytes = math.prod(self.shape)
        self.stored_bytes = -(-self.page_bytes // BLOCK) * BLOCK  # of a page on the drive
        self.capacity = sys.maxsize if self.drive is None or self.capacity is None else max(1, self.capacity)
        self.cache = Growable((0, *self.shape), 0, torch.int8)  # (slots, *shape)
        self.slot = np.zeros(0, np.int64)  # page -> slot or ABSENT
        self.used = np.zeros(0, np.int64)  # page -> `clock` when it was last used
        self.offset = np.zeros(0, np.int64)  # page -> byte offset on the drive; kept when the page is truncated
        self.clock = 0

    @property
    def n(self) -> int:
        return len(self.slot)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.cache.view().nbytes

    def append(self, pages: torch.Tensor) -> None:
        """Add pages (p, *shape); the last `capacity` of them are cached."""
        new = np.arange(self.n, self.n + len(pages))
        self.slot = np.append(self.slot, np.full(len(new), ABSENT))
        self.used = np.append(self.used, np.full(len(new), self.clock))
        if self.drive is not None:
            if (fresh := self.n - len(self.offset)) > 0:
                base = self.drive.allocate(fresh * self.stored_bytes)
                self.offset = np.append(self.offset, base + self.stored_bytes * np.arange(fresh))
            self._transfer("write", new, pages.contiguous().view(torch.uint8).reshape(len(pages), -1).numpy())
        cached = min(len(new), self.capacity)
        self._insert(new[-cached:], pages[-cached:])

    def batches(self, page: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
        """Load pages (m,), repeats allowed. Yields (indices into m, data (p, *shape), their places in data).

        A single batch if all fit into the cache. Otherwise cached pages stay and the others pass through a buffer:
        evicting for them would drop the pages that the next search needs first.
        """
        wanted = np.flatnonzero(np.bincount(page, minlength=1))
        self.clock += 1
        self.used[wanted] = self.clock
        missing = wanted[self.slot[wanted] == ABSENT]
        room = len(missing) if len(wanted) <= self.capacity else self.capacity - int((self.slot != ABSENT).sum())
        if len(missing[:room]):
            self._insert(missing[:room], self._read(missing[:room]))
        cached = np.flatnonzero(self.slot[page] != ABSENT)
        yield cached, self.cache.data, self.slot[page[cached]]
        for start in range(room, len(missing), self.capacity):
            part = missing[start : start + self.capacity]
            index = np.flatnonzero(np.isin(page, part, kind="table"))
            yield index, self._read(part), np.searchsorted(part, page[index])

    def truncate(self, n: int) -> None:
        """Forget all pages from n on."""
        self.slot, self.used = self.slot[:n], self.used[:n]

    def _insert(self, pages: np.ndarray, data: torch.Tensor) -> None:
        """Cache these pages, at most `capacity`; evicts the least recently used."""
        cached = np.flatnonzero(self.slot != ABSENT)
        surplus = max(0, len(cached) + len(pages) - self.capacity)
        self.slot[cached[np.argsort(self.used[cached], kind="stable")[:surplus]]] = ABSENT
        self.cache.extend(max(0, len(cached) - surplus + len(pages) - self.cache.n))
        slots = np.setdiff1d(np.arange(self.cache.n), self.slot)[: len(pages)]
        self.cache.data[torch.from_numpy(slots)] = data
        self.slot[pages] = slots

    def _read(self, pages: np.ndarray) -> torch.Tensor:
        """Pages (p,) from the drive, (p, *shape)."""
        start = time.perf_counter_ns()
        buffer = self._transfer("read", pages)
        if self.track is not None:
            self.track.add("drive", "abstract", start, buffer.nbytes)
        return torch.from_numpy(buffer[:, : self.page_bytes].view(np.int8)).view(-1, *self.shape)

    def _transfer(self, verb: str, pages: np.ndarray, data: np.ndarray | None = None) -> np.ndarray:
        """Read or write pages (p,) in whole blocks; returns the buffer, uint8 (p, stored_bytes)."""
        buffer = aligned(len(pages) * self.stored_bytes).reshape(len(pages), -1)
        if data is not None:
            buffer[:, : self.page_bytes] = data
        jobs = list(zip(self.offset[pages].tolist(), buffer, strict=True))
        self.drive.transfer(verb, jobs, self.stream, int(pages[0]))
        return buffer
