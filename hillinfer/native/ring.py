"""io_uring for batches of reads, writes and NVMe commands: one call per batch, no Python per request."""

import ctypes
import errno
import os
import threading
import weakref
from typing import NamedTuple

import numpy as np

from hillinfer import native

DEPTH = 128  # requests in flight; measured: 64 to 256 are equally fast for 4 KiB reads
NVME_STATUS = 0x10000  # as in ring.c
LBAS = 1 << 16  # most logical blocks of one NVMe command

_stuck: list[tuple[int, object]] = []  # rings whose requests never completed, and the memory they may still write to
_releasing = threading.Lock()


class Namespace(NamedTuple):
    """Makes a ring send NVMe commands; `transfer` then takes the namespace's character device as fd."""

    nsid: int
    lba: int  # bytes of a logical block


def reserve(fd: int, offset: int, nbytes: int) -> None:
    """Reserve space at a file's end. Without fallocate, a sparse extension that free space was found for.

    Raises OSError, ENOSPC without room; where nothing could be reserved, a later write may raise it instead.
    """
    try:
        os.posix_fallocate(fd, offset, nbytes)
    except OSError as error:  # EINVAL: libc then writes to every block instead, bytes that O_DIRECT refuses
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        about = os.fstatvfs(fd)
        if nbytes > about.f_bavail * about.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        os.ftruncate(fd, offset + nbytes)


class Rings:
    """Rings for any number of threads: each call takes a free one or opens another. A `tiers.engines.Engine`."""

    name = "io_uring"

    def __init__(self, depth: int = DEPTH, nvme: Namespace | None = None):
        """Raises OSError, with the fix, without io_uring (Linux 5.19 for `nvme`) or without native kernels."""
        if reason := native.why_not():
            raise OSError(f"io_uring needs the native kernels: {reason}")
        release_stuck()
        self.depth, self.nvme, self._free = depth, nvme, []
        self._free.append(self._open())
        self.close = weakref.finalize(self, _close, self._free)

    allocate = staticmethod(reserve)

    def transfer(
        self, write: bool, fd, offsets, addresses, lengths, timeout=0.0, keep=None, sums=None, share=1.0
    ) -> None:
        """Move pieces between file and memory, int64 (m,) each. With `nvme`, every piece is one command.

        fd       int for all pieces, or int32 (m,)
        timeout  seconds without a completion until ETIMEDOUT; 0 waits forever
        keep     owner of the memory, referenced after a timeout for as long as the kernel may write to it
        sums     uint32, expected checksums of the file's blocks; EBADMSG if a block read differs

        Raises OSError; its `offset` is that of the failed piece, or of the damaged block. ValueError for pieces that
        no request can move.
        """
        nsid, lba = self.nvme or (0, 0)
        limits = dict(unit=lba, least=1, most=lba * LBAS) if lba else {}
        if sums is not None:
            limits |= dict(unit=max(lba, native.BLOCK), end=len(sums) * native.BLOCK)
        pieces = native.pieces(offsets, addresses, lengths, **limits)
        table = None if sums is None else native.address(sums, "uint32", len(sums))
        fds = np.ascontiguousarray(np.broadcast_to(fd, len(offsets)), np.int32)
        done, failed = np.empty(len(pieces[0]), np.int64), ctypes.c_int64(0)
        ring, error = self._take(), 0
        try:
            where = *map(native.pointer, (*pieces, done)), ctypes.byref(failed)
            rest = int(timeout * 1000), native.library.isa, table, nsid, lba
            error = native.library.hi_ring_run(ring, native.pointer(fds), int(write), len(done), *where, *rest)
        finally:
            if error == errno.ETIMEDOUT and failed.value < 0:
                _stuck.append((ring, keep))
            elif failed.value >= 0:
                self._free.append(ring)
            else:
                native.library.hi_ring_close(ring)
        if error:
            piece = max(0, failed.value)
            if error == errno.ETIMEDOUT:
                piece = int(np.argmin(done >= pieces[2]))  # the first incomplete one
            where = f"{done[piece]} of {pieces[2][piece]} bytes at offset {pieces[0][piece]}"
            raised = _error(error, where)
            raised.offset = int(pieces[0][piece]) + (int(done[piece]) if error == errno.EBADMSG else 0)
            raise raised

    def _take(self) -> int:
        try:
            return self._free.pop()
        except IndexError:
            return self._open()

    def _open(self) -> int:
        error = ctypes.c_int()
        ring = native.library.hi_ring_open(self.depth, int(self.nvme is not None), ctypes.byref(error))
        if not ring:
            raise OSError(error.value, f"no io_uring here ({os.strerror(error.value)}): choose engine threads")
        return ring


def _error(code: int, where: str) -> OSError:
    """The exception for an error of `hi_ring_run`."""
    if code < 0:
        return OSError(f"only {where}")
    if code >= NVME_STATUS:
        return OSError(errno.EIO, f"NVMe status {code - NVME_STATUS:#x}, after {where}")
    return OSError(code, f"{os.strerror(code)}, after {where}")


def _close(rings: list[int]) -> None:
    while rings:
        native.library.hi_ring_close(rings.pop())
    release_stuck()


def release_stuck() -> int:
    """Close stuck rings whose requests have completed since and release their memory; returns how many remain."""
    with _releasing:
        for entry in list(_stuck):
            if not native.library.hi_ring_in_flight(entry[0]):
                _stuck.remove(entry)
                native.library.hi_ring_close(entry[0])
        return len(_stuck)


def why_not() -> str | None:
    """Why io_uring is unavailable here, or None if it is available."""
    try:
        Rings(2).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
