"""io_uring with entries wide enough for device commands, which `native.ring` has not: some Python for each command, a
MiB or so. No binding on PyPI is fit to depend on, and this needs two system calls.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable

import numpy as np

SETUP, ENTER = 425, 426  # the same numbers on every architecture
SQE128, CQE32 = 1 << 10, 1 << 11  # setup flags: entries wide enough for device commands
GETEVENTS, EXT_ARG = 1, 8  # of ENTER; the second is in Linux 5.11

_stuck: list[tuple] = []  # rings whose requests never came back, and their jobs: the kernel may still write to them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

SQE = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "<u2"),
        ("fd", "<i4"),
        ("offset", "<u8"),  # of a device command: its number in the low half
        ("address", "<u8"),
        ("length", "<u4"),
        ("op_flags", "<u4"),
        ("user_data", "<u8"),
        ("rest", "u1", 24),
    ]
)


class Ring:
    """A submission and a completion queue. For one thread at a time.

    OSError when the kernel has none (ENOSYS) or forbids it (EPERM).

    timeout   seconds without any answer after which a run ends with ETIMEDOUT; the ring is then of no more use
    """

    def __init__(self, depth: int, timeout: float = 60.0):
        release_stuck()
        seconds, rest = divmod(timeout / 2, 1)  # waited for twice: after a submission a call does not say it ran out
        self._wait = np.array([int(seconds), int(rest * 1e9)], np.int64)  # struct __kernel_timespec
        self._about = np.array([0, 0, self._wait.ctypes.data], np.uint64)  # struct io_uring_getevents_arg
        self.stuck, self._silent = False, 0
        params = np.zeros(30, np.uint32)  # struct io_uring_params, 120 bytes
        params[2] = SQE128 | CQE32
        self.fd = _call(SETUP, depth, ctypes.c_void_p(params.ctypes.data))
        self.depth = int(params[0])
        sq, cq = params[10:20], params[20:30]  # offsets within the two queues
        sqe_bytes, cqe_bytes = 128, 32
        sq_bytes, cq_bytes = int(sq[6] + 4 * params[0]), int(cq[5] + cqe_bytes * params[1])
        try:
            queues = [
                mmap.mmap(self.fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=at)
                for size, at in ((sq_bytes, 0), (cq_bytes, 0x8000000), (sqe_bytes * self.depth, 0x10000000))
            ]
        except BaseException:
            os.close(self.fd)
            raise
        submissions, completions, entries = (np.frombuffer(queue, np.uint8) for queue in queues)
        self._tail, self._mask = submissions[sq[1] :][:4].view("<u4"), int(submissions[sq[2] :][:4].view("<u4")[0])
        order = submissions[sq[6] :][: 4 * self.depth].view("<u4")
        order[:] = np.arange(self.depth)
        self.entries = entries.reshape(self.depth, sqe_bytes)  # raw bytes of the submission entries
        self._sqes = self.entries[:, :64].view(SQE)[:, 0]
        self._head, self._filled = completions[cq[0] :][:4].view("<u4"), completions[cq[1] :][:4].view("<u4")
        self._cq_mask = int(completions[cq[2] :][:4].view("<u4")[0])
        cqes = completions[cq[5] :][: cqe_bytes * int(params[1])].reshape(-1, cqe_bytes)
        self._who, self._result = cqes[:, :8].view("<u8")[:, 0], cqes[:, 8:12].view("<i4")[:, 0]

    def run(self, jobs: list, encode: Callable, depth: int | None = None) -> None:
        """Carry out all jobs with up to `depth` in flight.

        encode(ring, slot, job)   write job's submission into `ring.entries[slot]`
        job.done(result)          take the result; returns whether the job must go in again (a short transfer).
                                  It may raise: then what is in flight is waited for, and nothing more is submitted.
        """
        waiting, flying = list(range(len(jobs)))[::-1], 0
        limit = min(depth or self.depth, self.depth)
        try:
            while waiting or flying:
                new = 0
                while waiting and flying + new < limit:
                    index = waiting.pop()
                    slot = int(self._tail[0]) & self._mask
                    self.entries[slot] = 0
                    encode(self, slot, jobs[index])
                    self._sqes["user_data"][slot] = index
                    self._tail[0] += 1
                    new += 1
                flying += new
                self._enter(new, max(1, flying // 4))
                for index, result in self._reap():
                    flying -= 1
                    if jobs[index].done(result):
                        waiting.append(index)
        finally:
            try:
                while flying and not self.stuck:  # the kernel must not write into buffers that are no longer ours
                    self._enter(0, 1)
                    flying -= len(list(self._reap()))
            finally:
                if self.stuck:
                    self.flying = flying
                    _stuck.append((self, jobs))

    def fill(self, slot: int, opcode: int, fd: int, offset: int, address: int, length: int) -> None:
        """The common part of submission entry `slot`."""
        self._sqes[slot] = (opcode, 0, 0, fd, offset, address, length, 0, 0, np.zeros(24, np.uint8))

    def close(self) -> None:
        if self.fd is not None and not self.stuck:
            os.close(self.fd)
            self.fd = self.entries = self._sqes = self._tail = self._head = self._filled = self._who = self._result = (
                None
            )

    def _enter(self, submit: int, wait: int) -> None:
        while True:
            try:
                about = ctypes.c_void_p(self._about.ctypes.data), ctypes.c_size_t(self._about.nbytes)
                submit -= _call(ENTER, self.fd, submit, wait, GETEVENTS | EXT_ARG, *about)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno != errno.ETIME:
                    raise
            self._silent = self._silent + 1 if int(self._head[0]) == int(self._filled[0]) else 0
            if self._silent == 2:
                self.stuck = True
                raise OSError(errno.ETIMEDOUT, "no answer")
            if submit <= 0:
                return

    def _reap(self):
        head = int(self._head[0])
        while head != int(self._filled[0]):
            at = head & self._cq_mask
            index, result = int(self._who[at]), int(self._result[at])
            head = (head + 1) & 0xFFFFFFFF
            self._head[0] = head
            yield index, result


def release_stuck() -> int:
    """Close the rings whose requests have come back after all, and let go of their memory; how many have not."""
    for entry in list(_stuck):
        ring = entry[0]
        ring.flying -= len(list(ring._reap()))
        if not ring.flying and entry in _stuck:
            _stuck.remove(entry)
            ring.stuck = False
            ring.close()
    return len(_stuck)


def _call(number: int, *arguments) -> int:
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"io_uring: {os.strerror(code)}")
    return result
