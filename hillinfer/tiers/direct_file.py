"""The direct path on a preallocated file: O_DIRECT, by io_uring where the kernel lets us, else by threads."""

import threading
from pathlib import Path

import numpy as np

from hillinfer.tiers.checksums import memory_at
from hillinfer.tiers.record_file import BLOCK, RecordFile
from hillinfer.tiers.uring import READ, WRITE, Ring, Transfer, plain

DEPTH = 32  # reads of up to 1 MiB in flight


class DirectFile(RecordFile):
    """`allocate` and `transfer` of a `RecordFile` whose transfers need one thread each, not sixteen."""

    wide = False  # whether ring entries carry device commands
    what = "a preallocated file"

    def __init__(self, folder: Path, threads: int = 16, **options):
        super().__init__(folder, BLOCK, 1, threads=threads, engine="threads", **options)
        self._own: list[Ring] = []  # those that nobody uses; threads take one each
        self._lend = threading.Lock()
        try:
            self._own.append(self._ring())
            self.by = "io_uring"
        except OSError:
            self.by = f"{threads} threads"

    @property
    def about(self) -> str:
        return f"{'O_DIRECT' if self.direct else 'the page cache'} on {self.what}, {self.by}"

    def _move(self, verb: str, offsets, addresses, lengths, keep, share: float = 1, sums=None) -> None:
        if self.by != "io_uring":
            return super()._move(verb, offsets, addresses, lengths, keep, share, sums)
        with self._lend:
            ring = self._own.pop() if self._own else None
        try:
            ring = ring or self._ring()
            pieces = zip(offsets.tolist(), addresses.tolist(), lengths.tolist(), strict=True)
            jobs = [self._job(verb, offset, np.asarray(memory_at(at, length))) for offset, at, length in pieces]
            ring.keep = keep
            ring.run(jobs, self.encode, int(ring.depth * share))
        finally:
            if ring is not None:
                self.stuck = self.stuck or ring.stuck
                with self._lend:
                    self._own.append(ring)

    encode = staticmethod(plain)

    def close(self) -> None:
        for ring in self._own:
            ring.close()
        self._own = []
        super().close()

    def _ring(self) -> Ring:
        return Ring(DEPTH, self.wide, self.timeout)

    def _job(self, verb: str, offset: int, buffer: np.ndarray) -> Transfer:
        return Transfer(READ if verb == "read" else WRITE, self.fd, offset, buffer)
