"""A computational drive emulated by a process of its own, so that the host's interpreter lock does not serialise it.

Host and worker share a socket for commands (`wire`) and a nameless memory file for arrays; the drive's file is nameless
too, so nothing stays when either side is killed. The worker ends when the socket closes. Linux only; numpy only.
"""

import contextlib
import dataclasses
import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np

from hillinfer.errors import DriveError
from hillinfer.systems.hillinfer import wire
from hillinfer.systems.hillinfer.drive import Shape
from hillinfer.systems.hillinfer.remote import Call, Emulation, RemoteDrive

ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
START = "import sys; from hillinfer.systems.hillinfer.worker import main; main(*map(int, sys.argv[1:]))"


class EmulatedDrive(RemoteDrive):
    """A drive in a process."""

    def __init__(self, folder: Path, shape: Shape, settings: Emulation | None = None):
        settings = settings or Emulation()
        super().__init__(shape, settings, link := _Link(folder, shape, settings))
        self.pid = link.process.pid
        if not self.direct:
            warnings.warn(f"{folder} has no O_DIRECT: its reads go through the page cache", stacklevel=2)


class _Link:
    """The host's end: the process, its socket, the shared memory, and a thread that takes in the answers.

    That thread always listens: the worker need not wait for the host, and its death is seen at once.
    """

    def __init__(self, folder: Path, shape: Shape, settings: Emulation):
        self.pid = os.getpid()
        self.timeout, self.size = settings.timeout, settings.shared_bytes
        self.failure, self.heard, self.number = None, 0, 0
        # No Condition: a Ctrl-C inside its Python code can leave it locked for good. These locks and queues are C.
        self.lock, self.sending = threading.RLock(), threading.Lock()
        self.used: dict[int, int] = {}  # regions of the shared memory under way: offset -> bytes
        self.pending = {0: (ready := Call(self))}
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("hillinfer")
        try:
            os.ftruncate(memory, self.size)
            self.memory = mmap.mmap(memory, self.size)
            path = (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-c", START, str(theirs.fileno()), str(memory)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                env=os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
                process_group=0,  # a Ctrl-C in the terminal is for the host alone
            )
        finally:
            theirs.close()
            os.close(memory)
        self.listener = threading.Thread(target=self._listen, name="hillinfer-emulated", daemon=True)
        try:
            self.socket.settimeout(settings.timeout)
            about = dict(folder=str(folder), shape=dataclasses.asdict(shape), settings=dataclasses.asdict(settings))
            self.socket.send(wire.pack(0, about))
            self.listener.start()
            self.direct = ready.end()
        except BaseException:
            self.close()
            raise

    def send(self, op: str, *args, give: tuple[np.ndarray, ...] = (), take: int = 0, sink=None) -> Call:
        """See `Link.send`."""
        sizes = [-(-array.nbytes // 64) * 64 for array in give]
        region = at = self._room(sum(sizes) + take)
        arrays = []
        for array, size in zip(give, sizes, strict=True):
            np.ndarray(array.shape, array.dtype, self.memory, at)[...] = array
            arrays.append((at, array.shape, array.dtype.str))
            at += size
        arrays.append((at, (take,), "|u1"))
        call = Call(self, region, np.ndarray(take, np.uint8, self.memory, at), sink)
        with self.sending:  # apart from `lock`, which the listener needs while the worker is too busy to receive
            with self.lock:
                self._alive()
                self.number += 1
                self.pending[self.number] = call
            try:
                self.socket.send(wire.pack(self.number, [op, args, arrays]))
            except OSError as error:
                self.listener.join(5)  # it knows better why
                self._fail(f"the emulated drive takes no commands: {error}")
                self._alive()
        return call

    def receive(self, answers: queue.SimpleQueue):
        """The next of these answers, for as long as the worker answers anything within the timeout."""
        while True:
            heard = self.heard
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=self.timeout)
            self._expect(heard)

    def _expect(self, heard: int) -> None:
        if self.heard == heard and not self.failure:
            self._fail(f"the emulated drive (process {self.process.pid}) gave no answer for {self.timeout:g} s")
            self.process.kill()

    def close(self) -> None:
        if os.getpid() != self.pid:  # in a forked process: the worker is its parent's
            return
        self.process.kill()  # it has nothing to save
        self._fail("the emulated drive is closed")
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel may hold it in a read that never ends
            self.process.wait(self.timeout)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self.listener.is_alive() and threading.current_thread() is not self.listener:
            self.listener.join()
        self.socket.close()
        self.memory = None

    def _room(self, nbytes: int) -> int:
        """The offset of a free region of the shared memory, once there is one."""
        nbytes = max(64, -(-nbytes // 64) * 64)
        if nbytes > self.size:
            raise ValueError(f"an operation needs {nbytes:,} bytes of shared memory: raise shared_bytes to that")
        heard, since = self.heard, time.monotonic()
        while True:
            with self.lock:
                self._alive()
                at = self._gap(nbytes)
                if at is not None:
                    self.used[at] = nbytes
                    return at
            time.sleep(0.001)
            if self.heard != heard:
                heard, since = self.heard, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                self._expect(heard)

    def _gap(self, nbytes: int) -> int | None:
        at = 0
        for start, size in sorted(self.used.items()):
            if start - at >= nbytes:
                break
            at = start + size
        return at if at + nbytes <= self.size else None

    def _alive(self) -> None:
        if self.failure:
            raise DriveError(self.failure)

    def _fail(self, text: str) -> None:
        with self.lock:
            self.failure = self.failure or text
            for call in self.pending.values():
                call.out = None
                call.answers.put(("error", self.failure))
            self.pending.clear()

    def _listen(self) -> None:
        while True:
            try:
                message = self.socket.recv(wire.MESSAGE)
            except TimeoutError:
                continue
            except OSError:
                break
            if not message:
                break
            try:
                self._answer(*wire.answered(message))
            except (wire.WireError, TypeError, ValueError) as error:
                self._fail(f"the emulated drive (process {self.process.pid}) said what cannot be: {error}")
                self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        code = self.process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended (status {code})"
        self._fail(f"the emulated drive (process {self.process.pid}) {how}")

    def _answer(self, number: int, kind: str, payload) -> None:
        with self.lock:
            self.heard += 1
            call = self.pending.get(number)
            if call is None:  # given up
                return
            out = call.out
            if kind != "block":
                del self.pending[number]
                self.used.pop(call.region, None)
                call.out = None
                if kind == "error" and call.sink is None:
                    self._fail(payload)
        call.answers.put((kind, call.sink(out, *payload) if kind == "block" else payload))
