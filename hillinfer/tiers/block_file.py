"""One private, preallocated file in whole blocks, read and written around the page cache.

Every transfer of every drive passes here, and here the promises are kept: checksums, timeouts, and errors that name
the place. Bytes and numpy only.
"""

import ctypes
import errno
import os
import sys
import threading
import warnings
from concurrent.futures import Future, wait
from pathlib import Path

import numpy as np

from hillinfer import files, native
from hillinfer.errors import DriveError
from hillinfer.tiers.checksums import BLOCK, Checksums
from hillinfer.tiers.engines import Engine, open_engine

MAX_READ = 256 * BLOCK  # bytes of one request; longer transfers are split
SCRATCH = ".hillinfer-"  # prefix of drive files, for the moment that they have a name
TIMEOUT = 60.0  # seconds without progress after which a drive counts as stuck
START_WRITING = 0x02  # SYNC_FILE_RANGE_WRITE
KEEP_SIZE_AND_PUNCH_HOLE = 0x03  # of fallocate


def pieces(offset: int, buffer: np.ndarray, most: int = MAX_READ) -> list[tuple[int, np.ndarray]]:
    """A long transfer as jobs of at most `most` bytes, so that several are in flight."""
    return [(offset + at, buffer[at : at + most]) for at in range(0, len(buffer), most)]


def cuts(lengths: np.ndarray, most: int = MAX_READ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`pieces` of many transfers, lengths (m,): of each piece its transfer, the bytes before it, and its length."""
    counts = -(-lengths // most)
    of = np.repeat(np.arange(len(lengths)), counts)
    at = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    return of, at, np.minimum(lengths[of] - at, most)


class BlockFile:
    """A file on a drive, in whole blocks.

    Opened with O_DIRECT where the file system supports it (see `direct`), else buffered with a warning. The file is
    nameless, or unlinked as soon as it is open, so no crash, signal or power cut leaves it behind. Its mode is 0600.

    engine     `io_uring`, `threads`, `auto`, or an `Engine`
    checksums  verify every block read against what was written
    timeout    seconds without progress after which the drive counts as stuck; every later call then fails
    batch      sequences of a layer, for messages: stream = layer * batch + sequence
    """

    what = "a preallocated file"

    def __init__(
        self,
        folder: Path,
        threads: int = 16,
        engine: str | Engine = "auto",
        direct: bool = True,
        checksums: bool = True,
        timeout: float = TIMEOUT,
        batch: int = 1,
    ):
        self.folder, self.timeout, self.batch = folder, timeout, batch
        self.sums = Checksums() if checksums else None
        self.stuck, self.size = False, 0
        self.engine = open_engine(engine, threads) if isinstance(engine, str) else engine
        self._lock = threading.Lock()
        try:
            self.fd, self.direct = self._open(direct)
        except BaseException:
            self.engine.close()
            raise

    def _open(self, direct: bool) -> tuple[int, bool]:
        return _open_private(self.folder, direct)

    @property
    def about(self) -> str:
        return f"{'O_DIRECT on' if self.direct else 'the page cache of'} {self.what}, by {self.engine.name}"

    def allocate(self, nbytes: int) -> int:
        """Reserve whole blocks for anything but records. Returns their offset, for `transfer`."""
        with self._lock:
            return self._extend(nbytes)

    def _extend(self, nbytes: int) -> int:
        try:
            self.engine.allocate(self.fd, self.size, nbytes)
        except OSError as error:
            raise DriveError(
                f"no room for {nbytes:,} bytes of KV in {self.folder} ({error.strerror}); "
                "free some space or give --drive another folder"
            ) from error
        self.size += nbytes
        return self.size - nbytes

    def transfer(
        self,
        verb: str,
        jobs: list[tuple[int, np.ndarray]],
        stream: int,
        position,
        share: float = 1,
        verify: bool = True,
    ) -> None:
        """Read or write (offset, buffer) jobs. DriveError for a short or failed one, naming the place.

        position  token to name in an error, or a function from the failed offset to it
        share     fraction of the engine's threads to use
        verify    compare checksums; off where the processor must not touch the data
        """
        parts = [(offset, native.pointer(buffer), len(buffer)) for offset, buffer in jobs]
        self.move(verb, *np.array(parts, np.int64).reshape(-1, 3).T, jobs, stream, position, share, verify)

    def move(
        self, verb: str, offsets, addresses, lengths, keep, stream: int, position, share: float = 1, verify=True
    ) -> None:
        """`transfer` of pieces given as int64 (m,) arrays. `keep` owns their memory."""
        write, table = verb == "write", None
        try:
            if self.stuck:
                raise OSError(errno.ETIMEDOUT, "it was stuck before")
            if self.sums and write:
                self.sums.note(offsets, addresses, lengths)
            elif self.sums and verify:
                table = self.sums.covering(offsets, lengths)
            self.engine.transfer(write, self.fd, offsets, addresses, lengths, self.timeout, keep, table, share)
            if write and not self.direct:
                self._write_back(offsets, lengths)
        except OSError as error:
            self.stuck = self.stuck or error.errno == errno.ETIMEDOUT
            if not hasattr(error, "offset"):
                error.offset = int(offsets[0])
            raise self._failure(verb, stream, position, error) from error

    def _write_back(self, offsets, lengths) -> None:
        """Start writing dirty pages now: under a memory limit only clean ones can be dropped, and cgroup v1 kills
        its process rather than wait for dirty ones.
        """
        if sys.platform == "linux":
            start = int(offsets.min())
            span = int((offsets + lengths).max()) - start
            ctypes.CDLL(None).sync_file_range(self.fd, ctypes.c_int64(start), ctypes.c_int64(span), START_WRITING)

    def _failure(self, verb: str, stream: int, position, error: OSError) -> DriveError:
        if callable(position):
            position = position(error.offset)
        if error.errno == errno.ETIMEDOUT:
            error = f"no answer for {self.timeout:g} s: the drive is stuck, or too slow (timeout)"
        elif error.errno == errno.EBADMSG:
            error = f"the block at offset {error.offset} is not what was written there; check or replace the drive"
        layer, row = divmod(stream, self.batch)
        return DriveError(f"{verb} failed at layer {layer}, sequence {row}, position {position}: {error}")

    def trim(self) -> None:
        """Free the space at once: punch a hole where the data was."""
        if self.sums:
            self.sums.forget()
        if self.size and not self.stuck and sys.platform == "linux":
            size = ctypes.c_int64(self.size)
            ctypes.CDLL(None).fallocate64(self.fd, KEEP_SIZE_AND_PUNCH_HOLE, ctypes.c_int64(0), size)

    def close(self) -> None:
        if self.fd is None:
            return
        if late := self.engine.close():  # a late request must not reach another file under this number
            threading.Thread(target=_close_after, args=(late, self.fd), name="hillinfer-stuck", daemon=True).start()
        else:
            os.close(self.fd)
        self.fd = None


def _close_after(late: list[Future], fd: int) -> None:
    wait(late)
    os.close(fd)


def _open_private(folder: Path, direct: bool = True) -> tuple[int, bool]:
    """A nameless 0600 file opened in `folder`, and whether it bypasses the page cache."""
    if hasattr(os, "O_TMPFILE") and hasattr(os, "O_DIRECT"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | (os.O_DIRECT if direct else 0), 0o600), direct
        except OSError:
            pass  # not every file system has nameless files
    files.reclaim(folder, SCRATCH, ".drive")  # orphans of a process killed before the unlink below
    fd, path = files.scratch(folder, SCRATCH, ".drive")
    try:
        if not direct:
            return fd, False
        own = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_DIRECT)
        os.close(fd)
        return own, True
    except (OSError, AttributeError):
        warnings.warn(f"{folder} has no O_DIRECT: its reads go through the page cache", stacklevel=2)
        return fd, False
    finally:
        path.unlink()
