"""The file under a drive: one private, preallocated file of token-major records, read around the page cache.

Bytes only and numpy only, so that an emulated drive's process can use it without loading torch. Layout and I/O sizes
follow measurement: token-major records with neighbours joined across gaps of up to 8 KiB read 3 to 6 times faster than
per-head layouts or whole chunks; a fixed share of the reads for each thread beats one future per read by 2 to 3 times,
and io_uring, where there is one, that by 1.1 to 1.6 times with half the CPU.
"""

import ctypes
import errno
import math
import mmap
import os
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from hillinfer import files, native
from hillinfer.native.ring import Rings
from hillinfer.tiers.checksums import BLOCK, Checksums, memory_at

# BLOCK: O_DIRECT offsets, lengths and buffers are multiples of it, and each has a checksum.
GAP = 8 * 1024  # bytes read and thrown away rather than starting another read
MAX_READ = 1 << 20
SCRATCH = ".hillinfer-"  # names of drive files, for the moment that they have one
HEADROOM = 1024  # tokens reserved beyond those asked for, so that decode rarely grows the file
TIMEOUT = 60.0  # seconds without any answer after which a drive counts as stuck


class DriveError(OSError):
    """The drive failed in mid-run: full, gone, short, stuck or damaged. Says which layer and position."""


def aligned(nbytes: int) -> np.ndarray:
    """A page-aligned uint8 buffer, as O_DIRECT needs. Private: it counts as anonymous memory, not as shmem."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, BLOCK), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)[:nbytes]


class RecordFile:
    """Records of `record_bytes` bytes of `streams` streams, stream = layer * batch + row, in one file.

    The file is opened with O_DIRECT where the file system has it (`direct` says so), else buffered with a warning. It
    has no name, or loses it as soon as it is open: no crash, signal or power cut can leave it behind. Its mode is 0600.
    A segment holds a range of tokens of every stream; the first is one contiguous allocation, growth adds more.

    engine     how pieces are moved: `io_uring`, `threads` (preadv), or `auto`: io_uring where it can be had
    checksums  whether every block read is compared with what was written there
    timeout    seconds without any answer after which the drive counts as stuck: every call then fails
    """

    what = "a preallocated file"

    def __init__(
        self,
        folder: Path,
        record_bytes: int,
        streams: int,
        batch: int = 1,
        threads: int = 16,
        engine: str = "auto",
        direct: bool = True,
        checksums: bool = True,
        timeout: float = TIMEOUT,
    ):
        self.sums, self.timeout = Checksums() if checksums else None, timeout
        self.stuck = False
        self._stuck: list[Future] = []  # what did not come back in time
        self._rings = _rings(engine)
        self.engine = "io_uring" if self._rings else "threads"
        self._buffers: list[np.ndarray] = []  # free ones, for reads
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
        by = "io_uring" if self.engine == "io_uring" else f"{self._threads} threads"
        return f"{'O_DIRECT on' if self.direct else 'the page cache of'} {self.what}, by {by}"

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
            self.transfer("write", _pieces(offset, buffer), stream, position)
            done += n
        self.bytes_written += records.nbytes

    def read(self, stream: int, positions: np.ndarray, out: np.ndarray) -> int:
        """Records of any set of sorted positions (k,) into out (k, record_bytes) uint8. Returns the bytes read."""
        if len(positions) == 0:
            return 0
        buffer, places, nbytes = self.bring(stream, positions)
        self.copy(buffer, places, out)
        self.give_back(buffer)
        return nbytes

    def copy(self, buffer: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        """Records at these places of what `bring` gave, into out (k, record_bytes) uint8."""
        # They sit at multiples of `unit` in the buffer, so rows of `unit` bytes can be picked without a loop.
        unit = int(np.gcd(self.record_bytes, BLOCK))
        rows = (places[:, None] + np.arange(0, self.record_bytes, unit)) // unit
        np.take(buffer.reshape(-1, unit), rows.reshape(-1), axis=0, out=out.reshape(-1, unit), mode="clip")

    def give_back(self, buffer: np.ndarray) -> None:
        self._buffers.append(buffer)

    def bring(self, stream: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Read sorted positions (k,), with what lies between near ones: a buffer, the byte that each record begins at
        in it (k,), and the bytes read. The buffer is the caller's until `give_back`.
        """
        width = self.record_bytes
        offsets = self.offsets(stream, positions)
        starts, ends = _join(offsets // BLOCK * BLOCK, -(-(offsets + width) // BLOCK) * BLOCK)
        places = np.concatenate(([0], np.cumsum(ends - starts)))  # where each run starts in the buffer
        nbytes = int(places[-1])
        run = np.searchsorted(starts, offsets, "right") - 1
        first = positions[np.searchsorted(run, np.arange(len(starts)))]  # the first position of each run

        def position(offset: int) -> int:
            at = int(np.searchsorted(starts, offset, "right")) - 1
            return int(first[at] + (offset - starts[at]) // width)

        lengths = ends - starts
        count = -(-lengths // MAX_READ)
        of = np.repeat(np.arange(len(starts)), count)  # the run of each piece
        at = (np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)) * MAX_READ
        pieces = starts[of] + at, places[of] + at, np.minimum(lengths[of] - at, MAX_READ)
        buffer = self._take_buffer(nbytes)
        try:
            addresses = pieces[1] + native.pointer(buffer)
            self._transfer("read", pieces[0], addresses, pieces[2], buffer, stream, position)
        except BaseException:
            if not self.stuck:  # else it may still be written to
                self.give_back(buffer)
            raise
        self.bytes_read += nbytes
        self.reads += len(of)
        return buffer, places[run] + offsets - starts[run], nbytes

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

    def _take_buffer(self, nbytes: int) -> np.ndarray:
        """An aligned buffer of at least so many bytes, from those used before: mapping new pages costs more than
        reading into them."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = aligned(0)
        return buffer if len(buffer) >= nbytes else aligned(-(-nbytes * 5 // 4 // MAX_READ) * MAX_READ)

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
            self._buffers.clear()


def _close_after(late: list[Future], fd: int) -> None:
    wait(late)
    os.close(fd)


def _join(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge sorted block ranges whose gap is at most GAP into runs."""
    new = np.concatenate(([True], starts[1:] - np.maximum.accumulate(ends)[:-1] > GAP))
    last = np.concatenate((np.flatnonzero(new)[1:] - 1, [len(starts) - 1]))
    return starts[new], ends[last]


def _pieces(offset: int, buffer: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """A long transfer as jobs of at most MAX_READ, so that several are under way at once."""
    return [(offset + at, buffer[at : at + MAX_READ]) for at in range(0, len(buffer), MAX_READ)]


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
