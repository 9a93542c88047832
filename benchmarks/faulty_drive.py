"""Fault injection: an I/O engine that wraps another and fails at a chosen operation."""

import errno
import fcntl
import os
import threading
import time

import numpy as np

from hillinfer.tiers.block_file import BLOCK, BlockFile
from hillinfer.tiers.engines import ENGINES, Engine, Threads

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
    """Injects `fault` at operation number `at` of its kind. `counts`, int64 (4,), counts operations as in COUNTS."""

    def __init__(self, fault: str | None, at: int = 0, seed: int = 0, counts: np.ndarray | None = None):
        self.fault, self.verb, self.at = fault, FAULTS.get(fault), at
        self.counts = np.zeros(4, np.int64) if counts is None else counts
        self.rng, self.lock = np.random.default_rng(seed), threading.Lock()
        self.gone, self.released, self.pipes, self.undo = False, threading.Event(), [], []
        self.ends: tuple[int, int] | None = None  # descriptors for the reads and writes of a stuck drive

    def install_everywhere(self) -> None:
        """Wrap the engine of every file opened from now on, until `remove`."""
        real = dict(ENGINES)
        for name, make in real.items():
            ENGINES[name] = lambda threads, make=make: FaultyEngine(self, make(threads))
        self.undo.append(lambda: ENGINES.update(real))

    def install(self, file: BlockFile) -> None:
        """Wrap the engine of one open file, permanently."""
        file.engine = FaultyEngine(self, file.engine)

    def remove(self) -> None:
        """Stop all faults and release stuck transfers."""
        self.released.set()
        while self.pipes:
            os.close(self.pipes.pop())
        while self.undo:
            self.undo.pop()()

    def due(self, verb: str) -> bool:
        """Count an operation. True if the fault is due at it."""
        with self.lock:
            index = COUNTS.index(verb)
            self.counts[index] += 1
            now = verb == self.verb and self.counts[index] == self.at + 1
            self.counts[3] += now
            return now

    def inject(self, engine: Engine, fd: int, offset: int, length: int) -> None:
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
        elif fault == "short read":  # the file ends within this range
            os.ftruncate(fd, offset + int(self.rng.integers(length // BLOCK)) * BLOCK)
        elif fault == "flipped bit":  # in the file itself
            writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            at, bit = offset + int(self.rng.integers(length)), int(self.rng.integers(8))
            os.pwrite(writable, bytes([os.pread(writable, 1, at)[0] ^ 1 << bit]), at)
            os.fsync(writable)
            os.close(writable)
        else:
            self.stick(engine)

    def stick(self, engine: Engine) -> None:
        """Block all later transfers: threads wait in their calls; the kernel waits on an empty or a full pipe."""
        if isinstance(engine, Threads):
            engine.read = engine.write = lambda *args: self.released.wait() and 0
            return
        empty, full = os.pipe(), os.pipe()
        self.pipes += [*empty, *full]
        fcntl.fcntl(full[1], fcntl.F_SETPIPE_SZ, BLOCK)
        os.write(full[1], bytes(BLOCK))
        self.ends = empty[0], full[1]


class FaultyEngine:
    """An `Engine` that forwards to another until the fault is due."""

    def __init__(self, drive: FaultyDrive, engine: Engine):
        self.drive, self.engine, self.name = drive, engine, engine.name

    def allocate(self, fd: int, offset: int, nbytes: int) -> None:
        if self.drive.due("extend") or self.drive.gone:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.engine.allocate(fd, offset, nbytes)

    def transfer(self, write, fd, offsets, addresses, lengths, *rest, **options) -> None:
        drive = self.drive
        due = drive.due("write" if write else "read")
        if drive.gone:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if due:
            piece = int(drive.rng.integers(len(offsets)))
            drive.inject(self.engine, fd, int(offsets[piece]), int(lengths[piece]))
        fd = drive.ends[write] if drive.ends else fd
        self.engine.transfer(write, fd, offsets, addresses, lengths, *rest, **options)

    def close(self):
        return self.engine.close()
