"""Engines reserve and move the blocks of one file: the narrow waist of every drive, three methods wide.

`Rings` (io_uring, `hillinfer.native.ring`) and `Threads` (preadv and pwritev) implement it; a test's engine that fails
implements it too, and takes its place in `ENGINES`.
"""

import errno
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np

from hillinfer.errors import DriveError
from hillinfer.native.ring import Rings, reserve
from hillinfer.tiers.checksums import compare, memory_at


class Engine(Protocol):
    name: str

    def allocate(self, fd: int, offset: int, nbytes: int) -> None:
        """Reserve space in the file. Raises OSError."""

    def transfer(
        self,
        write: bool,
        fd: int | np.ndarray,
        offsets: np.ndarray,
        addresses: np.ndarray,
        lengths: np.ndarray,
        timeout: float,
        keep: object,
        sums: np.ndarray | None = None,
        share: float = 1,
    ) -> None:
        """Move pieces between the file and memory, int64 (m,) each.

        fd       one for all pieces, or one for each, (m,)
        timeout  seconds without any progress after which the transfer fails with ETIMEDOUT
        keep     owner of the memory, kept alive for as long as a late request may touch it
        sums     checksums of the file's blocks, uint32; a read that differs fails with EBADMSG
        share    fraction of the engine's threads to use, so that another transfer can run beside this one
        Raises OSError with the failed piece's offset in `offset`.
        """

    def close(self) -> list[Future] | None:
        """Stop. Returns requests that have not come back; the file must stay open until they have."""


class Threads:
    """preadv and pwritev on a pool of threads, each with a fixed share of the pieces.

    read, write  replace the system calls, for tests
    """

    def __init__(self, threads: int, read: Callable | None = None, write: Callable | None = None):
        self.threads, self.name, self.read, self.write = threads, f"{threads} threads", read, write
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hillinfer-drive")
        self._late: list[Future] = []

    allocate = staticmethod(reserve)

    def transfer(self, write, fd, offsets, addresses, lengths, timeout, keep, sums=None, share=1) -> None:
        pieces, moved = np.stack((np.broadcast_to(fd, len(offsets)), offsets, addresses, lengths), 1), [0]
        threads = min(max(1, int(self.threads * share)), len(pieces))
        call = self.write or os.pwritev if write else self.read or os.preadv
        work = [self._pool.submit(_move, call, pieces[i::threads].tolist(), moved, keep) for i in range(threads)]
        self._wait(work, moved, timeout)
        if errors := [future.exception() for future in work if future.exception()]:
            raise min(errors, key=lambda error: getattr(error, "offset", 0))  # the first one in the file
        if sums is not None:
            compare(sums, offsets, addresses, lengths)

    def _wait(self, work: list[Future], moved: list[int], timeout: float) -> None:
        waiting, stuck = set(work), False
        try:
            while waiting:
                before = moved[0]
                done, waiting = wait(waiting, timeout, FIRST_COMPLETED)
                if not done and moved[0] == before:
                    stuck, self._late = True, self._late + list(waiting)
                    raise OSError(errno.ETIMEDOUT, "no answer")
        finally:
            if not stuck:  # a Ctrl-C: no thread may still write into a buffer that is reused
                wait(work, timeout)

    def close(self) -> list[Future]:
        late = [future for future in self._late if not future.done()]
        self._pool.shutdown(wait=not late)
        return late


def _move(call: Callable, pieces: list, moved: list[int], keep: object) -> None:
    """One thread's pieces. `keep` holds their memory for as long as this runs; `moved` counts progress."""
    for fd, offset, address, length in pieces:
        try:
            done, buffer = 0, memory_at(address, length)
            while done < length:  # short transfers are legal: continue where one ended
                n = call(fd, [buffer[done:]], offset + done)
                if n <= 0:
                    raise OSError(f"only {done} of {length} bytes at offset {offset}")
                done += n
                moved[0] += 1
        except OSError as error:
            error.offset = offset
            raise


ENGINES: dict[str, Callable[[int], Engine]] = {"io_uring": lambda threads: Rings(), "threads": Threads}


def open_engine(name: str, threads: int) -> Engine:
    """`io_uring`, `threads`, or `auto`: io_uring where the system has it. DriveError where io_uring is missing."""
    try:
        return ENGINES["io_uring" if name == "auto" else name](threads)
    except OSError as error:
        if name != "auto":
            raise DriveError(error.strerror or str(error)) from None
        return ENGINES["threads"](threads)
