"""The direct path on a preallocated file: O_DIRECT, by io_uring where the kernel lets us, else by threads."""

import threading
from pathlib import Path

import numpy as np

from hillinfer.tiers.record_file import BLOCK, DriveError, RecordFile
from hillinfer.tiers.uring import READ, WRITE, Ring, Transfer, plain

DEPTH = 32  # reads of up to 1 MiB in flight


class DirectFile(RecordFile):
    """`allocate` and `transfer` of a `RecordFile` whose transfers need one thread each, not sixteen."""

    wide = False  # whether ring entries carry device commands
    what = "a preallocated file"

    def __init__(self, folder: Path, threads: int = 16):
        super().__init__(folder, BLOCK, 1, threads=threads)
        self._rings: list[Ring] = []  # those that nobody uses; threads take one each
        self._lend = threading.Lock()
        try:
            self._rings.append(self._ring())
            self.by = "io_uring"
        except OSError:
            self.by = f"{threads} threads"

    @property
    def about(self) -> str:
        return f"{'O_DIRECT' if self.direct else 'the page cache'} on {self.what}, {self.by}"

    def transfer(
        self, verb: str, jobs: list[tuple[int, np.ndarray]], stream: int, position: int, share: float = 1
    ) -> None:
        if self.by != "io_uring":
            return super().transfer(verb, jobs, stream, position, share)
        with self._lend:
            ring = self._rings.pop() if self._rings else None
        try:
            ring = ring or self._ring()
            ring.run([self._job(verb, offset, buffer) for offset, buffer in jobs], self.encode, int(ring.depth * share))
        except OSError as error:
            raise DriveError(f"{verb} failed at layer {stream}, sequence 0, position {position}: {error}") from error
        finally:
            if ring is not None:
                with self._lend:
                    self._rings.append(ring)

    encode = staticmethod(plain)

    def close(self) -> None:
        for ring in self._rings:
            ring.close()
        self._rings = []
        super().close()

    def _ring(self) -> Ring:
        return Ring(DEPTH, self.wide)

    def _job(self, verb: str, offset: int, buffer: np.ndarray) -> Transfer:
        return Transfer(READ if verb == "read" else WRITE, self.fd, offset, buffer)
