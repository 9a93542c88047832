"""Blocks of one private, preallocated file, read and written around the page cache by either engine.

Bytes and numpy only, so that an emulated drive's process can use it without loading torch. Every transfer of every
drive passes here, and here the promises are kept: checksums, timeouts, and errors that name the place.
"""

import ctypes
import errno
import mmap
import os
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from hillinfer import files, native
from hillinfer.errors import DriveError
from hillinfer.native.ring import Rings
from hillinfer.tiers.checksums import BLOCK, Checksums, memory_at

# BLOCK: O_DIRECT offsets, lengths and buffers are multiples of it, and each has a checksum.
MAX_READ = 1 << 20  # bytes moved at once: what is longer goes in several pieces
SCRATCH = ".hillinfer-"  # names of drive files, for the moment that they have one
TIMEOUT = 60.0  # seconds without any answer after which a drive counts as stuck


def aligned(nbytes: int) -> np.ndarray:
    """A page-aligned uint8 buffer, as O_DIRECT needs. Private: it counts as anonymous memory, not as shmem."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, BLOCK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)[:nbytes]


class BlockFile:
    """One file on a drive, in whole blocks.

    It is opened with O_DIRECT where the file system has it (`direct` says so), else buffered with a warning. It has no
    name, or loses it as soon as it is open: no crash, signal or power cut can leave it behind. Its mode is 0600.

    engine     how pieces are moved: `io_uring`, `threads` (preadv), or `auto`: io_uring where it can be had
    checksums  whether every block read is compared with what was written there
    timeout    seconds without any answer after which the drive counts as stuck: every call then fails
    batch      sequences of a layer, for messages: a transfer's stream is layer * batch + sequence
    """

    what = "a preallocated file"

    def __init__(
        self,
        folder: Path,
        threads: int = 16,
        engine: str = "auto",
        direct: bool = True,
        checksums: bool = True,
        timeout: float = TIMEOUT,
        batch: int = 1,
    ):
        self.folder, self.timeout, self.batch = folder, timeout, batch
        self.sums = Checksums() if checksums else None
        self.stuck = False
        self._stuck: list[Future] = []  # what did not come back in time
        self._rings = _rings(engine)
        self.engine = "io_uring" if self._rings else "threads"
        self.fd, self.direct = self._open(direct)
        self.size = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hillinfer-drive")
        self._threads = threads

    def _open(self, direct: bool) -> tuple[int, bool]:
        return _open_private(self.folder, direct)

    @property
    def about(self) -> str:
        by = "io_uring" if self.engine == "io_uring" else f"{self._threads} threads"
        return f"{'O_DIRECT on' if self.direct else 'the page cache of'} {self.what}, by {by}"

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

    def transfer(
        self,
        verb: str,
        jobs: list[tuple[int, np.ndarray]],
        stream: int,
        position,
        share: float = 1,
        verify: bool = True,
    ) -> None:
        """Read or write (offset, buffer) jobs; any short or failed one is a DriveError that names the place.

        position   what to name: a token's, or a function that finds it by the offset that failed
        share      of the threads take part, so that others can go on beside this one
        verify     whether to compare checksums; not where the processor is not to touch what is read
        """
        parts = [(offset, native.pointer(buffer), len(buffer)) for offset, buffer in jobs]
        self._transfer(verb, *np.array(parts, np.int64).reshape(-1, 3).T, jobs, stream, position, share, verify)

    def _transfer(
        self, verb: str, offsets, addresses, lengths, keep, stream: int, position, share: float = 1, verify: bool = True
    ) -> None:
        """Move pieces, int64 (m,) each, and note or compare their checksums. `keep` holds their memory."""
        try:
            if self.stuck:
                raise OSError(errno.ETIMEDOUT, "it was stuck before")
            if self.sums and verb == "write":
                self.sums.note(offsets, addresses, lengths)
            sums = self.sums if verify and verb == "read" else None
            self._move(verb, offsets, addresses, lengths, keep, share, sums)
            if verb == "write" and not self.direct:
                self._write_back(offsets, lengths)
            if sums and not self._rings:  # which have compared it already
                bad = sums.check(offsets, addresses, lengths)
                if bad is not None:
                    error = OSError(errno.EBADMSG, "damaged")
                    error.offset = bad
                    raise error
        except OSError as error:
            if not hasattr(error, "offset"):
                error.offset = int(offsets[0])
            raise self._failure(verb, stream, position, error) from error

    def _move(self, verb: str, offsets, addresses, lengths, keep, share: float = 1, sums=None) -> None:
        """The transfer itself, by either engine. Raises OSError, whose `offset` says which piece failed."""
        if self._rings:
            table = sums.covering(offsets, lengths) if sums else None
            try:
                self._rings.transfer(verb == "write", self.fd, offsets, addresses, lengths, self.timeout, keep, table)
            except OSError as error:
                self.stuck = self.stuck or error.errno == errno.ETIMEDOUT
                raise
            return
        call, moved = {"read": os.preadv, "write": os.pwritev}[verb], [0]

        def work(pieces: np.ndarray, keep=keep) -> None:  # the memory lives for as long as a thread may touch it
            for offset, address, length in pieces.tolist():
                try:
                    done, buffer = 0, memory_at(address, length)
                    while done < length:  # short transfers are legal: go on where one ended
                        n = call(self.fd, [buffer[done:]], offset + done)
                        if n <= 0:
                            raise OSError(f"only {done} of {length} bytes at offset {offset}")
                        done += n
                        moved[0] += 1
                except OSError as error:
                    error.offset = offset
                    raise

        pieces = np.stack((offsets, addresses, lengths), 1)
        threads = min(max(1, int(self._threads * share)), len(pieces))
        everyone = [self._pool.submit(work, pieces[i::threads]) for i in range(threads)]
        waiting = set(everyone)
        try:
            while waiting:
                before = moved[0]
                done, waiting = wait(waiting, self.timeout, FIRST_COMPLETED)
                if not done and moved[0] == before:
                    self.stuck, self._stuck = True, self._stuck + list(waiting)
                    raise OSError(errno.ETIMEDOUT, "no answer")
        finally:
            if not self.stuck:  # a Ctrl-C: none may still fill a buffer that is given back
                wait(everyone, self.timeout)
        if errors := [future.exception() for future in everyone if future.exception()]:
            raise min(errors, key=lambda error: getattr(error, "offset", 0))  # the first one by place

    def _write_back(self, offsets, lengths) -> None:
        """Have the kernel start to write these pieces: under a memory limit only clean pages can be dropped, and a
        cgroup of version 1 kills its process rather than wait for dirty ones."""
        if sys.platform == "linux":
            start, only_start_writing = int(offsets.min()), ctypes.c_uint(0x02)
            span = int((offsets + lengths).max()) - start
            ctypes.CDLL(None).sync_file_range(self.fd, ctypes.c_int64(start), ctypes.c_int64(span), only_start_writing)

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
        """Give all space back at once: a hole where the data was."""
        if self.sums:
            self.sums.forget()
        if self.size and not self.stuck and sys.platform == "linux":
            keep_size_and_punch_hole = 0x03
            ctypes.CDLL(None).fallocate64(
                self.fd, keep_size_and_punch_hole, ctypes.c_int64(0), ctypes.c_int64(self.size)
            )

    def close(self) -> None:
        if self.fd is not None:
            late = [future for future in self._stuck if not future.done()]
            self._pool.shutdown(wait=not late)
            if self._rings:
                self._rings.close()
            if late:  # a thread that comes back must not meet another file under this number
                threading.Thread(target=_close_after, args=(late, self.fd), name="hillinfer-stuck", daemon=True).start()
            else:
                os.close(self.fd)
            self.fd = None


def _close_after(late: list[Future], fd: int) -> None:
    wait(late)
    os.close(fd)


def _rings(engine: str) -> Rings | None:
    """None for threads. Raises DriveError where io_uring is asked for and cannot be had."""
    if engine == "threads":
        return None
    try:
        return Rings()
    except OSError as error:
        if engine == "io_uring":
            raise DriveError(error.strerror or str(error)) from None
        return None


def _open_private(folder: Path, direct: bool = True) -> tuple[int, bool]:
    """An open 0600 file without a name in `folder`, and whether it bypasses the page cache, as `direct` asks."""
    if hasattr(os, "O_TMPFILE") and hasattr(os, "O_DIRECT"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | (os.O_DIRECT if direct else 0), 0o600), direct
        except OSError:
            pass  # not every file system has nameless files
    files.reclaim(folder, SCRATCH, ".drive")  # what a kill before the last line of this has left
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
