"""A computational drive emulated by a process of its own, so that the host's interpreter lock does not serialise it.

Host and worker share a socket for commands and a nameless memory file for arrays; the drive's file is nameless too, so
nothing stays when either side is killed. The worker ends when the socket closes. Linux only; numpy only.
"""

import contextlib
import mmap
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hillinfer.tiers.computational import SMARTSSD, Rates, ScoreBlock, Shape, Work
from hillinfer.tiers.record_file import DriveError

CHUNK = 8 << 20  # bytes of records that one command moves, or a quarter of the shared memory if that is less
MESSAGE = 1 << 16  # bytes; messages are small, arrays travel in the shared memory
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
START = "import sys; from hillinfer.tiers.worker import main; main(*map(int, sys.argv[1:]))"


@dataclass(frozen=True)
class Emulation:
    """How a drive is emulated. `rates` give the report's modelled time; with `paced`, operations take at least that."""

    dram_bytes: int = 4 << 30  # for key codes, as a SmartSSD has; codes beyond it spill to the file
    page_bytes: int = 1 << 20  # of codes, read from the file at once
    rates: Rates = SMARTSSD
    paced: bool = False
    threads: int = 16  # that read and write the file, where io_uring does not
    engine: str = "auto"  # of `RecordFile`
    shared_bytes: int = 64 << 20  # for what is under way between host and worker; used only as far as needed
    timeout: float = 60.0  # seconds without an answer after which the worker counts as dead
    checksums: bool = True  # of `RecordFile`


class RemoteDrive:
    """`ComputationalDrive` at the other end of a link. Any thread may call it, but a stream has one writer."""

    def __init__(self, shape: Shape, settings: Emulation, link):
        self.shape, self._link = shape, link
        self._lengths = [0] * shape.streams
        self._chunk = min(CHUNK, settings.shared_bytes // 4)
        self.close = weakref.finalize(self, link.close)  # called by the user, at collection or at exit
        self.direct = link.direct

    def write(self, stream: int, start: int, records: np.ndarray, codes: np.ndarray) -> None:
        shape, n = self.shape, len(records)
        _check("records", records, (n, shape.record_bytes), np.uint8)
        _check("codes", codes, (shape.kv_heads, n, shape.head_dim), np.int8)
        if start != self._lengths[stream]:
            raise ValueError(f"stream {stream} holds {self._lengths[stream]} tokens: {start} is not the next")
        step = max(1, self._chunk // (shape.record_bytes + shape.code_bytes))
        for at in range(0, n, step):
            give = records[at : at + step], codes[:, at : at + step]
            self._link.send("write", stream, start + n, give=give)
            self._lengths[stream] += len(give[0])

    def rescale(self, stream: int, doublings: np.ndarray) -> None:
        _check("doublings", doublings, (self.shape.kv_heads, self.shape.head_dim), np.uint8)
        self._link.send("rescale", stream, give=(doublings,))

    def hold(self, stream: int, positions: np.ndarray, hot: bool) -> None:
        self._link.send("hold", stream, hot, give=(self._positions(stream, positions),))

    def begin_evaluate(self, stream: int, query: np.ndarray, block: int = 1024) -> "_Call":
        _check("query", query, (self.shape.kv_heads, max(1, query.shape[1]), self.shape.head_dim), np.int8)
        if block < 1:
            raise ValueError(f"a score block of {block} tokens is none")
        width = 1 + self.shape.kv_heads  # int32 for each token: its position and its scores

        def sink(out: np.ndarray, at: int, m: int) -> ScoreBlock:
            both = out.view(np.int32)[at * width : (at + m) * width].reshape(width, m).copy()
            return ScoreBlock(both[0], both[1:])

        take = 4 * width * self._lengths[stream]
        return self._link.send("evaluate", stream, block, give=(query,), take=take, sink=sink)

    def evaluate(self, stream: int, query: np.ndarray, block: int = 1024) -> "_Call":
        return self.begin_evaluate(stream, query, block)

    def begin_fetch(self, stream: int, positions: np.ndarray) -> "_Fetch":
        positions, width = self._positions(stream, positions), self.shape.record_bytes
        records = np.empty((len(positions), width), np.uint8)
        step, calls = max(1, self._chunk // width), []
        for start in range(0, max(1, len(positions)), step):
            part = records[start : start + step]

            def sink(out: np.ndarray, part: np.ndarray = part) -> None:
                part[:] = out.reshape(part.shape)

            give = (positions[start : start + step],)
            calls.append(self._link.send("fetch", stream, give=give, take=part.nbytes, sink=sink))
        return _Fetch(calls, records)

    def fetch(self, stream: int, positions: np.ndarray) -> np.ndarray:
        return self.begin_fetch(stream, positions).result()

    def begin_attend(self, stream: int, query: np.ndarray, runs: np.ndarray, dtype: str) -> "_Attention":
        out = np.empty((*query.shape[:2], query.shape[2] + 1), np.float32)

        def sink(answer: np.ndarray) -> None:
            out[:] = answer.view(np.float32).reshape(out.shape)

        give = (np.ascontiguousarray(query, np.float32), np.asarray(runs, np.int64).reshape(-1, 2))
        return _Attention([self._link.send("attend", stream, dtype, give=give, take=out.nbytes, sink=sink)], out)

    def truncate(self, stream: int, n: int) -> None:
        if n < 0:
            raise ValueError(f"cannot truncate to {n} tokens")
        self._link.send("truncate", stream, n)
        self._lengths[stream] = min(n, self._lengths[stream])

    def report(self) -> dict[str, Work]:
        return self._link.send("report").end()

    def _positions(self, stream: int, positions: np.ndarray) -> np.ndarray:
        positions, n = np.asarray(positions, np.int64), self._lengths[stream]
        if len(positions) and (positions[0] < 0 or positions[-1] >= n or (np.diff(positions) <= 0).any()):
            raise ValueError(f"positions must be sorted, distinct and below {n}, the length of stream {stream}")
        return positions


class EmulatedDrive(RemoteDrive):
    """A drive in a process."""

    def __init__(self, folder: Path, shape: Shape, settings: Emulation | None = None):
        settings = settings or Emulation()
        super().__init__(shape, settings, link := _Link((folder, shape, settings), settings))
        self.pid = link.process.pid
        if not self.direct:
            warnings.warn(f"{folder} has no O_DIRECT: its reads go through the page cache", stacklevel=2)


def _check(name: str, array: np.ndarray, shape: tuple, dtype: type) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, not {array.dtype} {array.shape}")


class _Call:
    """One command under way, and what the worker has answered so far; of an evaluation, the protocol's `Evaluation`."""

    def __init__(self, link: "_Link", region: int | None = None, out: np.ndarray | None = None, sink=None):
        self.link, self.region, self.out, self.sink = link, region, out, sink
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.over, self.work, self.error = False, None, None

    def __iter__(self):
        return self

    def __next__(self) -> ScoreBlock:
        if not self.over and (block := self._take()) is not None:
            return block
        self.end()
        raise StopIteration

    def end(self):
        """Wait for the end. Returns the worker's last word, mostly the work done."""
        while not self.over:
            self._take()
        if self.error:
            raise DriveError(self.error)
        return self.work

    def _take(self):
        """Wait for the next answer, and return it if it is a block."""
        kind, value = self.link.receive(self.answers)
        if kind == "block":
            return value
        self.work, self.error, self.over = (value, None, True) if kind == "done" else (None, value, True)


class _Fetch:
    """The protocol's `Fetch`."""

    def __init__(self, calls: list[_Call], records: np.ndarray):
        self._calls, self._records, self.work = calls, records, None

    def result(self) -> np.ndarray:
        self.work = sum((call.end() for call in self._calls), Work())
        return self._records


class _Attention(_Fetch):
    def result(self) -> tuple[np.ndarray, np.ndarray]:
        out = super().result()
        return out[..., :-1], out[..., -1:]


class _Link:
    """The host's end: the process, its socket, the shared memory, and a thread that takes in the answers.

    That thread always listens: the worker need not wait for the host, and its death is seen at once.
    """

    def __init__(self, config: tuple, settings: Emulation):
        self.timeout, self.size = settings.timeout, settings.shared_bytes
        self.failure, self.heard, self.number = None, 0, 0
        # No Condition: a Ctrl-C inside its Python code can leave it locked for good. These locks and queues are C.
        self.lock, self.sending = threading.RLock(), threading.Lock()
        self.used: dict[int, int] = {}  # regions of the shared memory under way: offset -> bytes
        self.pending = {0: (ready := _Call(self))}
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("hillinfer")
        try:
            os.ftruncate(memory, self.size)
            self.memory = mmap.mmap(memory, self.size)
            path = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
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
            self.socket.send(pickle.dumps(config))
            self.listener.start()
            self.direct = ready.end()
        except BaseException:
            self.close()
            raise

    def send(self, op: str, *args, give: tuple[np.ndarray, ...] = (), take: int = 0, sink=None) -> _Call:
        """Send a command with arrays, and room for `take` bytes of answer. What the worker says of that room goes
        through `sink(out, ...)`. A command without a sink, which nobody waits for, fails the drive if it fails.
        """
        sizes = [-(-array.nbytes // 64) * 64 for array in give]
        region = at = self._room(sum(sizes) + take)
        arrays = []
        for array, size in zip(give, sizes, strict=True):
            np.ndarray(array.shape, array.dtype, self.memory, at)[...] = array
            arrays.append((at, array.shape, array.dtype.str))
            at += size
        arrays.append((at, (take,), "|u1"))
        call = _Call(self, region, np.ndarray(take, np.uint8, self.memory, at), sink)
        with self.sending:  # apart from `lock`, which the listener needs while the worker is too busy to receive
            with self.lock:
                self._alive()
                self.number += 1
                self.pending[self.number] = call
            try:
                self.socket.send(pickle.dumps((self.number, op, args, arrays)))
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
                message = self.socket.recv(MESSAGE)
            except TimeoutError:
                continue
            except OSError:
                break
            if not message:
                break
            self._answer(*pickle.loads(message))
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
