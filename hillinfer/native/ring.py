"""io_uring for batches of reads and writes: one call moves them all, with no Python for each."""

import ctypes
import errno
import os
import threading
import weakref

import numpy as np

from hillinfer import native

DEPTH = 128  # under way at once: measured, 64 to 256 do equally well for 4 KiB reads


_stuck: list[tuple[int, object]] = []  # rings whose requests never came back, and the memory that they may write to
_releasing = threading.Lock()


class Short(OSError):
    """The file ended before a piece did."""


class Rings:
    """Rings for any number of threads: a call takes a free one, or opens another. A `tiers.engines.Engine`."""

    name = "io_uring"

    def __init__(self, depth: int = DEPTH):
        """Raises OSError, with the fix, where there is no io_uring or no compiled kernels."""
        if reason := native.why_not():
            raise OSError(f"io_uring needs the native kernels: {reason}")
        release_stuck()
        self.depth, self._free = depth, []
        self._free.append(self._open())
        self.close = weakref.finalize(self, _close, self._free)

    def transfer(
        self,
        write: bool,
        fd: int,
        offsets: np.ndarray,
        addresses: np.ndarray,
        lengths: np.ndarray,
        timeout: float = 0,
        keep: object = None,
        sums: np.ndarray | None = None,
        share: float = 1,
    ) -> None:
        """Move pieces between file and memory; all int64 (m,). Raises OSError whose `offset` says which one failed.

        timeout  seconds in which nothing happened, after which it is ETIMEDOUT; 0 waits for ever
        keep     what holds the memory: the kernel may still write to it after a timeout, so it is then kept
        sums     checksums of the file's blocks, which what is read must have (EBADMSG)
        """
        pieces = [np.ascontiguousarray(part, np.int64) for part in (offsets, addresses, lengths)]
        done, failed = np.empty(len(offsets), np.int64), ctypes.c_int64(0)
        ring, error = self._take(), 0
        try:
            where = *map(native.pointer, (*pieces, done)), ctypes.byref(failed)
            rest = int(timeout * 1000), native.isa_number(), None if sums is None else native.pointer(sums)
            error = native.call("hi_ring_run", ring, fd, int(write), len(done), *where, *rest)
        finally:
            if error == errno.ETIMEDOUT and failed.value < 0:
                _stuck.append((ring, keep))
            elif failed.value >= 0:
                self._free.append(ring)
            else:
                native.call("hi_ring_close", ring)
        if error:
            piece = max(0, failed.value)
            if error == errno.ETIMEDOUT:
                piece = int(np.argmin(done >= pieces[2]))  # the first that is not through
            where = f"{done[piece]} of {pieces[2][piece]} bytes at offset {pieces[0][piece]}"
            raised = Short(f"only {where}") if error < 0 else OSError(error, f"{os.strerror(error)}, after {where}")
            raised.offset = int(pieces[0][piece]) + (int(done[piece]) if error == errno.EBADMSG else 0)
            raise raised

    def _take(self) -> int:
        try:
            return self._free.pop()
        except IndexError:
            return self._open()

    def _open(self) -> int:
        error = ctypes.c_int()
        ring = native.call("hi_ring_open", self.depth, ctypes.byref(error))
        if not ring:
            raise OSError(error.value, f"no io_uring here ({os.strerror(error.value)}): choose engine threads")
        return ring


def _close(rings: list[int]) -> None:
    while rings:
        native.call("hi_ring_close", rings.pop())
    release_stuck()


def release_stuck() -> int:
    """Close the rings whose requests have come back after all, and let go of their memory; how many have not."""
    with _releasing:
        for entry in list(_stuck):
            if not native.call("hi_ring_flying", entry[0]):
                _stuck.remove(entry)
                native.call("hi_ring_close", entry[0])
        return len(_stuck)


def why_not() -> str | None:
    """Why io_uring cannot be used here; None where it can."""
    try:
        Rings(2).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
