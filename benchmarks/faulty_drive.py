"""A drive that fails on purpose: every `BlockFile` opened while one is installed fails at a chosen transfer."""

import contextlib
import copy
import errno
import fcntl
import os
import threading
import time

import numpy as np

from hillinfer.tiers import block_file
from hillinfer.tiers.block_file import BLOCK, BlockFile

COUNTS = ("read", "write", "extend", "injected")
FAULTS = {  # name -> the operation that triggers it
    "read error": "read",
    "write error": "write",
    "short read": "read",
    "full": "extend",
    "full at a write": "write",
    "flipped bit": "read",
    "slow": "read",
    "stuck read": "read",
    "stuck write": "write",
    "gone at a read": "read",
    "gone at a write": "write",
}


class FaultyDrive:
    """`fault` happens at operation number `at` of its kind. `counts`, int64 (4,), counts operations as in COUNTS."""

    def __init__(self, fault: str | None, at: int, seed: int, counts: np.ndarray):
        self.fault, self.verb, self.at = fault, FAULTS.get(fault), at
        self.rng, self.counts, self.lock = np.random.default_rng(seed), counts, threading.Lock()
        self.gone, self.released, self.pipes, self.undo = False, threading.Event(), [], []
        self.ends: dict[str, int] = {}  # descriptors that a stuck drive waits for

    def install_everywhere(self) -> None:
        """In every file opened from now on, until `remove`."""
        make = BlockFile.__init__

        def faulty(file: BlockFile, *args, **options) -> None:
            make(file, *args, **options)
            self.install(file)

        BlockFile.__init__ = faulty
        self.undo.append(lambda: setattr(BlockFile, "__init__", make))

    def install(self, file: BlockFile) -> None:
        """In one open file, for good."""
        move, extend = file._move, file._extend
        file._move = lambda verb, *rest, **more: self.move(file, move, verb, *rest, **more)
        file._extend = lambda nbytes: self.extend(extend, nbytes)

    def remove(self) -> None:
        """End all faults; stuck transfers return."""
        self.released.set()
        while self.pipes:
            os.close(self.pipes.pop())
        while self.undo:
            self.undo.pop()()

    def due(self, verb: str) -> bool:
        """Count an operation. True if the fault happens at it."""
        with self.lock:
            index = COUNTS.index(verb)
            self.counts[index] += 1
            now = verb == self.verb and self.counts[index] == self.at + 1
            self.counts[3] += now
            return now

    def extend(self, real, nbytes: int) -> int:
        if self.due("extend") or self.gone:
            with full():
                return real(nbytes)
        return real(nbytes)

    def move(self, file: BlockFile, real, verb: str, offsets, addresses, lengths, *rest, **more) -> None:
        due = self.due(verb)
        if self.gone:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if due:
            piece = int(self.rng.integers(len(offsets)))
            self.inject(file, verb, int(offsets[piece]), int(lengths[piece]))
        if self.ends:
            return self.wait(file, verb, offsets, addresses, lengths, *rest, **more)
        real(verb, offsets, addresses, lengths, *rest, **more)

    def inject(self, file: BlockFile, verb: str, offset: int, length: int) -> None:
        fault = self.fault
        if fault in ("read error", "write error"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "full at a write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.startswith("gone"):
            self.gone = True
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if fault == "slow":
            time.sleep(0.03)
        elif fault == "short read":  # the file ends within this piece
            os.ftruncate(file.fd, offset + int(self.rng.integers(length // BLOCK)) * BLOCK)
        elif fault == "flipped bit":  # of the file itself
            fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR)
            at, bit = offset + int(self.rng.integers(length)), int(self.rng.integers(8))
            os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1 << bit]), at)
            os.fsync(fd)
            os.close(fd)
        else:
            self.stick(verb)

    def stick(self, verb: str) -> None:
        """Let no later transfer return: the kernel waits for data of an empty pipe, or for room in a full one.
        `preadv` and `pwritev`, which fail on pipes, are replaced by calls that wait.
        """
        empty, full = os.pipe(), os.pipe()
        self.pipes += [*empty, *full]
        fcntl.fcntl(full[1], fcntl.F_SETPIPE_SZ, BLOCK)
        os.write(full[1], bytes(BLOCK))
        for name in ("preadv", "pwritev"):
            call = getattr(os, name)
            setattr(os, name, lambda *args: self.released.wait() and 0)
            self.undo.append(lambda name=name, call=call: setattr(os, name, call))
        self.ends = {"read": empty[0], "write": full[1]}

    def wait(self, file: BlockFile, verb: str, *rest, **more) -> None:
        """The file's own transfer, on a descriptor that never answers."""
        stand = copy.copy(file)
        stand.fd = self.ends[verb]
        try:
            type(file)._move(stand, verb, *rest, **more)
        finally:
            file.stuck, file._stuck = file.stuck or stand.stuck, stand._stuck


@contextlib.contextmanager
def full():
    """A file system without room for `BlockFile`."""
    real = block_file.os.posix_fallocate

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    block_file.os.posix_fallocate = refuse
    try:
        yield
    finally:
        block_file.os.posix_fallocate = real
