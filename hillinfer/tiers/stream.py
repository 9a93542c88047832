"""One stream of records on a drive. The newest are held back until they fill whole blocks, and are written behind the
computation; a read takes from memory whatever is not surely on the drive.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from hillinfer.tiers.drive import DirectDrive

HELD = 64  # tokens gathered before a write: one large write beats many of one block
BEHIND = 64 << 20  # bytes that may wait to be written; more would defeat the memory budget


class Writer:
    """One thread that writes. `submit` waits while more than `behind` bytes would be under way."""

    def __init__(self, behind: int = BEHIND):
        self.behind = behind
        self._pool = ThreadPoolExecutor(1, "hillinfer-write")
        self._room = threading.Condition()
        self._behind = 0

    def submit(self, nbytes: int, job: Callable[[], None]) -> Future:
        with self._room:
            self._room.wait_for(lambda: not self._behind or self._behind + nbytes <= self.behind)
            self._behind += nbytes
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._done(nbytes))
        return future

    def _done(self, nbytes: int) -> None:
        with self._room:
            self._behind -= nbytes
            self._room.notify()

    def close(self) -> None:
        self._pool.shutdown(wait=True)


class Stream:
    """Append-only records of one layer and batch row.

    `state` is (flushed, tail): tokens below `flushed` are on the drive, the rest in `tail`. It is replaced as a whole,
    so that a read in any thread sees no half of a change; only append, truncate and the writer replace it.
    """

    def __init__(self, drive: DirectDrive, index: int, writer: Writer | None = None):
        self.drive, self.index, self.writer = drive, index, writer
        self.state = (0, drive.geometry.empty(0))
        self._changing = threading.Lock()
        self._writing: Future | None = None

    @property
    def n(self) -> int:
        flushed, tail = self.state
        return flushed + len(tail)

    def append(self, records: torch.Tensor, coded=None) -> int:
        """Add records (n, 2, Hkv, D); returns the bytes whose write began. Raises what an earlier write raised.

        `coded` is for drives that score; this one does not.
        """
        if self._writing and self._writing.done():
            self.settle()
        with self._changing:
            flushed, tail = self.state
            tail = torch.cat((tail, records))
            self.state = (flushed, tail)
        if self._writing or len(tail) < HELD:
            return 0
        group, width = self.drive.geometry.group, self.drive.geometry.record_bytes
        whole = len(tail) // group * group
        self.drive.reserve(flushed + whole)  # a full drive is an error here and now

        def write() -> None:
            self.drive.write(self.index, flushed, tail[:whole])
            with self._changing:
                self.state = (flushed + whole, self.state[1][whole:].clone())

        if self.writer is None:
            write()
        else:
            self._writing = self.writer.submit(whole * width, write)
        return whole * width

    def settle(self) -> None:
        """Wait for the write under way. Raises what it raised; nothing is lost then, as its records are still held."""
        if self._writing:
            future, self._writing = self._writing, None
            future.result()

    def read(self, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        """Records of sorted positions (k,): (k, 2, Hkv, D) and the bytes that the drive read. Any thread may."""
        flushed, tail = self.state
        split = int(np.searchsorted(positions, flushed))
        stored, nbytes = self.drive.read(self.index, positions[:split])
        if split == len(positions):
            return stored, nbytes
        return torch.cat((stored, tail[torch.from_numpy(positions[split:] - flushed)])), nbytes

    def lend(self, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray | None, int]:
        """As `read`, without a copy where all are on the drive: records, which of them (None: all in order), bytes."""
        if len(positions) and positions[-1] >= self.state[0]:
            records, nbytes = self.read(positions)
            return records, None, nbytes
        return self.drive.lend(self.index, positions)

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on. The block that n falls into comes back into memory, to be written again."""
        self.settle()
        flushed, tail = self.state
        if n < flushed:
            kept = n // self.drive.geometry.group * self.drive.geometry.group
            flushed, tail = kept, self.drive.read(self.index, np.arange(kept, n))[0]
        self.state = (flushed, tail[: n - flushed].clone())

    @property
    def nbytes(self) -> int:
        return self.state[1].nbytes
