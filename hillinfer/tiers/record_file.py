"""The file under a drive: one private, preallocated file of token-major records, read around the page cache.

Bytes only and numpy only, so that an emulated drive's process can use it without loading torch. Layout and I/O sizes
follow measurement: token-major records with neighbours joined across gaps of up to 8 KiB read 3 to 6 times faster than
per-head layouts or whole chunks; a fixed share of the reads for each thread beats one future per read by 2 to 3 times.
"""

import ctypes
import math
import mmap
import os
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 4096  # bytes; O_DIRECT offsets, lengths and buffers are multiples of it
GAP = 8 * 1024  # bytes read and thrown away rather than starting another read
MAX_READ = 1 << 20
HEADROOM = 1024  # tokens reserved beyond those asked for, so that decode rarely grows the file


class DriveError(OSError):
    """The drive failed in mid-run: full, gone, short or unreadable. Says which layer and position."""


def aligned(nbytes: int) -> np.ndarray:
    """A page-aligned uint8 buffer, as O_DIRECT needs. Private: it counts as anonymous memory, not as shmem."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, BLOCK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)[:nbytes]


class RecordFile:
    """Records of `record_bytes` bytes of `streams` streams, stream = layer * batch + row, in one file.

    The file is opened with O_DIRECT where the file system has it (`direct` says so), else buffered with a warning. It
    has no name, or loses it as soon as it is open: no crash, signal or power cut can leave it behind. Its mode is 0600.
    A segment holds a range of tokens of every stream; the first is one contiguous allocation, growth adds more.
    """

    def __init__(
        self, folder: Path, record_bytes: int, streams: int, batch: int = 1, threads: int = 16, direct: bool = True
    ):
        self.folder, self.record_bytes, self.streams, self.batch = folder, record_bytes, streams, batch
        self.group = (
            math.lcm(record_bytes, BLOCK) // record_bytes
        )  # records in the smallest run that fills whole blocks
        self.fd, self.direct = self._open(direct)
        self.starts = np.zeros(0, np.int64)  # first token of each segment
        self.bases = np.zeros(0, np.int64)  # byte offset of each segment
        self.lengths = np.zeros(0, np.int64)  # tokens per stream in each segment
        self.size = 0
        self.bytes_read = self.bytes_written = self.reads = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hillinfer-drive")
        self._threads = threads

    def _open(self, direct: bool) -> tuple[int, bool]:
        return _open_private(self.folder, direct)

    @property
    def about(self) -> str:
        return "O_DIRECT on a preallocated file" if self.direct else "page cache of a preallocated file"

    @property
    def capacity(self) -> int:
        return int(self.lengths.sum())

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every stream. Raises DriveError when the file system is full."""
        with self._lock:
            if tokens <= self.capacity:
                return
            more = -(-(tokens - self.capacity + HEADROOM) // self.group) * self.group
            base = self._extend(more * self.record_bytes * self.streams)
            self.starts = np.append(self.starts, self.capacity)
            self.bases = np.append(self.bases, base)
            self.lengths = np.append(self.lengths, more)

    def allocate(self, nbytes: int) -> int:
        """Room for something other than records, in whole blocks: its byte offset, for `transfer`."""
        with self._lock:
            return self._extend(nbytes)

    def _extend(self, nbytes: int) -> int:
        try:
            os.posix_fallocate(self.fd, self.size, nbytes)
        except OSError as error:
            raise DriveError(
                f"no room for {nbytes:,} bytes of KV in {self.folder} ({error.strerror}); "
                "free some space or give --drive another folder"
            ) from error
        self.size += nbytes
        return self.size - nbytes

    def offsets(self, stream: int, positions: np.ndarray) -> np.ndarray:
        """Byte offsets in the file of a stream's tokens. positions (k,) int64 -> (k,) int64."""
        segment = np.searchsorted(self.starts, positions, "right") - 1
        token = stream * self.lengths[segment] + positions - self.starts[segment]
        return self.bases[segment] + token * self.record_bytes

    def write(self, stream: int, start: int, records: np.ndarray) -> None:
        """Write whole groups: records (n, record_bytes) uint8 of tokens start.. ; start and n are multiples of the
        group.
        """
        self.reserve(start + len(records))
        done = 0
        while done < len(records):  # a write must not run across a segment's end
            position = start + done
            segment = int(np.searchsorted(self.starts, position, "right")) - 1
            n = min(len(records) - done, int(self.starts[segment] + self.lengths[segment]) - position)
            buffer = aligned(n * self.record_bytes)
            buffer.reshape(n, -1)[:] = records[done : done + n]
            offset = int(self.offsets(stream, np.array([position]))[0])
            self.transfer("write", [(offset, buffer)], stream, position)
            done += n
        self.bytes_written += records.nbytes

    def read(self, stream: int, positions: np.ndarray, out: np.ndarray) -> int:
        """Records of any set of sorted positions (k,) into out (k, record_bytes) uint8. Returns the bytes read."""
        width = self.record_bytes
        if len(positions) == 0:
            return 0
        offsets = self.offsets(stream, positions)
        starts, ends = _join(offsets // BLOCK * BLOCK, -(-(offsets + width) // BLOCK) * BLOCK)
        places = np.concatenate(([0], np.cumsum(ends - starts)))  # where each run starts in the buffer
        buffer = aligned(int(places[-1]))
        jobs = [
            (int(start + at), buffer[place + at : place + min(at + MAX_READ, end - start)])
            for start, end, place in zip(starts, ends, places[:-1], strict=True)
            for at in range(0, int(end - start), MAX_READ)
        ]
        self.transfer("read", jobs, stream, int(positions[0]))
        run = np.searchsorted(starts, offsets, "right") - 1
        where = places[run] + offsets - starts[run]
        # Records sit at multiples of `unit` in the buffer, so rows of `unit` bytes can be picked without a loop.
        unit = int(np.gcd(width, BLOCK))
        rows = (where[:, None] + np.arange(0, width, unit)) // unit
        np.take(buffer.reshape(-1, unit), rows.reshape(-1), axis=0, out=out.reshape(-1, unit), mode="clip")
        self.bytes_read += len(buffer)
        self.reads += len(jobs)
        return len(buffer)

    def transfer(
        self, verb: str, jobs: list[tuple[int, np.ndarray]], stream: int, position: int, share: float = 1
    ) -> None:
        """Read or write (offset, buffer) jobs with a static share for each thread; any short or failed one is a
        DriveError that names the place. `share` of the threads take part, so that others can go on beside this one.
        """
        call = {"read": os.preadv, "write": os.pwritev}[verb]

        def work(jobs):
            for offset, buffer in jobs:
                done = 0
                while done < len(buffer):  # short transfers are legal: go on where one ended
                    n = call(self.fd, [buffer[done:]], offset + done)
                    if n <= 0:
                        raise OSError(f"only {done} of {len(buffer)} bytes at offset {offset}")
                    done += n

        threads = min(max(1, int(self._threads * share)), len(jobs))
        shares = [jobs[i::threads] for i in range(threads)]
        try:
            if len(shares) <= 2:
                for part in shares:
                    work(part)
            else:
                for future in [self._pool.submit(work, part) for part in shares]:
                    future.result()
        except OSError as error:
            layer, row = divmod(stream, self.batch)
            raise DriveError(f"{verb} failed at layer {layer}, sequence {row}, position {position}: {error}") from error

    def trim(self) -> None:
        """Give all space back at once: a hole where the data was."""
        if self.size and sys.platform == "linux":
            keep_size_and_punch_hole = 0x03
            ctypes.CDLL(None).fallocate64(
                self.fd, keep_size_and_punch_hole, ctypes.c_int64(0), ctypes.c_int64(self.size)
            )

    def close(self) -> None:
        if self.fd is not None:
            self._pool.shutdown(wait=True)
            os.close(self.fd)
            self.fd = None


def _join(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge sorted block ranges whose gap is at most GAP into runs."""
    new = np.concatenate(([True], starts[1:] - np.maximum.accumulate(ends)[:-1] > GAP))
    last = np.concatenate((np.flatnonzero(new)[1:] - 1, [len(starts) - 1]))
    return starts[new], ends[last]


def _open_private(folder: Path, direct: bool = True) -> tuple[int, bool]:
    """An open 0600 file without a name in `folder`, and whether it bypasses the page cache, as `direct` asks."""
    if hasattr(os, "O_TMPFILE") and hasattr(os, "O_DIRECT"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | (os.O_DIRECT if direct else 0), 0o600), direct
        except OSError:
            pass  # not every file system has nameless files
    fd, name = tempfile.mkstemp(prefix=".hillinfer-", dir=folder)
    try:
        if not direct:
            return fd, False
        try:
            direct = os.open(name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        except OSError:
            direct = None
        if direct is not None and hasattr(os, "O_DIRECT"):
            os.close(fd)
            return direct, True
        if direct is not None:
            os.close(direct)
        warnings.warn(f"{folder} has no O_DIRECT: its reads go through the page cache", stacklevel=2)
        return fd, False
    finally:
        Path(name).unlink()
