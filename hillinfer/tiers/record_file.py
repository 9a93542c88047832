"""Token-major records in a `BlockFile`: where they lie, and reads of many scattered ones.

Layout and I/O sizes
follow measurement: token-major records with neighbours joined across gaps of up to 8 KiB read 3 to 6 times faster than
per-head layouts or whole chunks; a fixed share of the reads for each thread beats one future per read by 2 to 3 times,
and io_uring, where there is one, that by 1.1 to 1.6 times with half the CPU.
"""

import math
from pathlib import Path

import numpy as np

from hillinfer import native
from hillinfer.tiers.block_file import BLOCK, MAX_READ, BlockFile, aligned

GAP = 8 * 1024  # bytes read and thrown away rather than starting another read
HEADROOM = 1024  # tokens reserved beyond those asked for, so that decode rarely grows the file


class RecordFile(BlockFile):
    """Records of `record_bytes` bytes of `streams` streams, stream = layer * batch + row, in one file.

    A segment holds a range of tokens of every stream; the first is one contiguous allocation, growth adds more. The
    other arguments are those of `BlockFile`.
    """

    def __init__(self, folder: Path, record_bytes: int, streams: int, batch: int = 1, *args, **options):
        super().__init__(folder, *args, batch=batch, **options)
        self.record_bytes, self.streams = record_bytes, streams
        self.group = math.lcm(record_bytes, BLOCK) // record_bytes  # records in the smallest run of whole blocks
        self.starts = np.zeros(0, np.int64)  # first token of each segment
        self.bases = np.zeros(0, np.int64)  # byte offset of each segment
        self.lengths = np.zeros(0, np.int64)  # tokens per stream in each segment
        self.bytes_read = self.bytes_written = self.reads = 0
        self._buffers: list[np.ndarray] = []  # free ones, for reads

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

    def _take_buffer(self, nbytes: int) -> np.ndarray:
        """An aligned buffer of at least so many bytes, from those used before: mapping new pages costs more than
        reading into them."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = aligned(0)
        return buffer if len(buffer) >= nbytes else aligned(-(-nbytes * 5 // 4 // MAX_READ) * MAX_READ)

    def close(self) -> None:
        super().close()
        self._buffers.clear()


def _join(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge sorted block ranges whose gap is at most GAP into runs."""
    new = np.concatenate(([True], starts[1:] - np.maximum.accumulate(ends)[:-1] > GAP))
    last = np.concatenate((np.flatnonzero(new)[1:] - 1, [len(starts) - 1]))
    return starts[new], ends[last]


def _pieces(offset: int, buffer: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """A long transfer as jobs of at most MAX_READ, so that several are under way at once."""
    return [(offset + at, buffer[at : at + MAX_READ]) for at in range(0, len(buffer), MAX_READ)]
