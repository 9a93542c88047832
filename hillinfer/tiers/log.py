"""The log of one sequence's records in one layer: append-only, on a drive, its newest records held in memory.

The newest are held back until they fill whole blocks, and are written behind the computation; a read takes records from
memory until they are safely on the drive.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.record_file import RecordFile
from hillinfer.tiers.records import Records

HELD = 64  # tokens gathered before a write: one large write beats many of one block
BEHIND = 64 << 20  # bytes that may wait to be written; more would defeat the memory budget


class Writer:
    """One writing thread. `submit` blocks while more than `behind` bytes would be in flight."""

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


class RecordLog:
    """Append-only records of one stream, stream = layer * batch + sequence.

    `state` is (flushed, tail): tokens below `flushed` are on the drive, the rest in `tail`. It is replaced as a whole,
    so that a read in any thread sees a consistent pair; only append, truncate and the writer replace it.
    """

    def __init__(self, file: RecordFile, geometry: Geometry, stream: int, writer: Writer | None = None):
        self.file, self.geometry, self.stream, self.writer = file, geometry, stream, writer
        self.state = (0, geometry.empty(0))
        self._changing = threading.Lock()
        self._writing: Future | None = None

    @property
    def n(self) -> int:
        flushed, tail = self.state
        return flushed + len(tail)

    def fills(self, n: int) -> bool:
        """True if n more records make a write."""
        return len(self.state[1]) + n >= HELD

    def append(self, records: torch.Tensor, codes=None) -> int:
        """Add records (n, 2, Hkv, D). Returns the bytes whose write began; raises the error of an earlier write.

        `codes` is for drives that score; this one does not.
        """
        if self._writing and self._writing.done():
            self.flush()
        with self._changing:
            flushed, tail = self.state
            tail = torch.cat((tail, records))
            self.state = (flushed, tail)
        if self._writing or len(tail) < HELD:
            return 0
        whole = len(tail) // self.file.group * self.file.group
        self.file.reserve(flushed + whole)  # a full drive is an error here and now

        def write() -> None:
            self.file.write(self.stream, flushed, self.geometry.as_bytes(tail[:whole]))
            with self._changing:
                self.state = (flushed + whole, self.state[1][whole:].clone())

        if self.writer is None:
            write()
        else:
            self._writing = self.writer.submit(whole * self.file.record_bytes, write)
        return whole * self.file.record_bytes

    def flush(self) -> None:
        """Wait for the write in flight. Raises its error; nothing is lost then, as its records are still in memory."""
        if self._writing:
            future, self._writing = self._writing, None
            future.result()

    def read(self, positions: np.ndarray, exact: bool = True) -> tuple[Records, int]:
        """Records of sorted positions (k,), in place where all are on the drive, and the bytes read from it.

        A log with a lossy copy of its records may read that where `exact` is False. Any thread may call it.
        """
        flushed, tail = self.state
        on_drive = int(np.searchsorted(positions, flushed))
        held = Records(tail, positions[on_drive:] - flushed)  # never written to, so it may be read in place
        if not on_drive:
            return held, 0
        data, rows, nbytes = self.file.read_in_place(self.stream, positions[:on_drive])
        stored = self._records(data, rows)
        if on_drive == len(positions):
            return stored, nbytes
        return Records(torch.cat((stored.tensor(), held.tensor()))), nbytes

    def _records(self, data: np.ndarray, rows: np.ndarray | None) -> Records:
        return Records(torch.from_numpy(data).view(self.geometry.dtype).view(-1, *self.geometry.record_shape), rows)

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on. The block that n falls into comes back into memory, to be written again."""
        self.flush()
        flushed, tail = self.state
        if n < flushed:
            kept = n // self.file.group * self.file.group
            flushed, tail = kept, self.read(np.arange(kept, n))[0].tensor()
        self.state = (flushed, tail[: n - flushed].clone())

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.state[1].nbytes
