"""A computational drive emulated by a process of its own, so that the host's interpreter lock does not serialise it.

Host and worker share a socket for commands and a nameless memory file for arrays; the drive's file is nameless too, so
nothing stays when either side is killed. The worker ends when the socket closes. Linux only; numpy only.
"""

import contextlib
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hillinfer.tiers.computational import SMARTSSD, CodeMemory, Meter, Rates, ScoreBlock, Shape, Work
from hillinfer.tiers.record_file import DriveError, RecordFile

HELD = 64  # records gathered in the worker's memory before a write: one large write beats many of one block
CHUNK = 8 << 20  # bytes of records that one command moves, or a quarter of the shared memory if that is less
MESSAGE = 1 << 16  # bytes; messages are small, arrays travel in the shared memory
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
START = "import sys; from hillinfer.tiers.emulated import main; main(*map(int, sys.argv[1:]))"


@dataclass(frozen=True)
class Emulation:
    """How a drive is emulated. `rates` give the report's modelled time; with `paced`, operations take at least that."""

    dram_bytes: int = 4 << 30  # for key codes, as a SmartSSD has; codes beyond it spill to the file
    page_bytes: int = 1 << 20  # of codes, read from the file at once
    rates: Rates = SMARTSSD
    paced: bool = False
    threads: int = 16  # that read and write the file
    shared_bytes: int = 64 << 20  # for what is under way between host and worker; used only as far as needed
    timeout: float = 60.0  # seconds without an answer after which the worker counts as dead


class EmulatedDrive:
    """`ComputationalDrive` in a process. Any thread may call it, but a stream has one writer."""

    def __init__(self, folder: Path, shape: Shape, settings: Emulation | None = None):
        settings = settings or Emulation()
        self.shape = shape
        self._lengths = [0] * shape.streams
        self._chunk = min(CHUNK, settings.shared_bytes // 4)
        self._link = _Link((folder, shape, settings), settings)
        self.pid = self._link.process.pid
        self.close = weakref.finalize(self, self._link.close)  # called by the user, at collection or at exit
        self.direct = self._link.direct
        if not self.direct:
            warnings.warn(f"{folder} has no O_DIRECT: its reads go through the page cache", stacklevel=2)

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


def _check(name: str, array: np.ndarray, shape: tuple, dtype: type) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, not {array.dtype} {array.shape}")


class _Call:
    """One command under way, and what the worker has answered so far; of an evaluation, the protocol's `Evaluation`."""

    def __init__(self, link: "_Link", region: int | None = None, out: np.ndarray | None = None, sink=None):
        self.link, self.region, self.out, self.sink = link, region, out, sink
        self.blocks: deque = deque()
        self.done, self.work, self.error = False, None, None

    def __iter__(self):
        return self

    def __next__(self) -> ScoreBlock:
        self.link.wait(lambda: self.blocks or self.done)
        if self.blocks:
            return self.blocks.popleft()
        self.end()
        raise StopIteration

    def end(self):
        """Wait for the end. Returns the worker's last word, mostly the work done."""
        self.link.wait(lambda: self.done)
        if self.error:
            raise DriveError(self.error)
        return self.work


class _Fetch:
    """The protocol's `Fetch`."""

    def __init__(self, calls: list[_Call], records: np.ndarray):
        self._calls, self._records, self.work = calls, records, None

    def result(self) -> np.ndarray:
        self.work = sum((call.end() for call in self._calls), Work())
        return self._records


class _Link:
    """The host's end: the process, its socket, the shared memory, and a thread that takes in the answers.

    That thread always listens: the worker need not wait for the host, and its death is seen at once.
    """

    def __init__(self, config: tuple, settings: Emulation):
        self.timeout, self.size = settings.timeout, settings.shared_bytes
        self.failure, self.heard, self.number = None, 0, 0
        self.changed, self.sending = threading.Condition(), threading.Lock()
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
        with self.sending:  # apart from `changed`, which the listener needs while the worker is too busy to receive
            with self.changed:
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

    def wait(self, until) -> None:
        """Wait until the condition holds, for as long as the worker answers something within the timeout."""
        with self.changed:
            while not until():
                heard = self.heard
                if not self.changed.wait(self.timeout) and self.heard == heard:
                    self._fail(f"the emulated drive (process {self.process.pid}) gave no answer for {self.timeout:g} s")
                    self.process.kill()

    def close(self) -> None:
        self._fail("the emulated drive is closed")
        self.process.kill()  # it has nothing to save
        self.process.wait()
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
        with self.changed:
            self.wait(lambda: self.failure or self._gap(nbytes) is not None)
            self._alive()
            at = self._gap(nbytes)
            self.used[at] = nbytes
            return at

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
        with self.changed:
            self.failure = self.failure or text
            for call in self.pending.values():
                call.done, call.error, call.out = True, self.failure, None
            self.pending.clear()
            self.changed.notify_all()

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
        with self.changed:
            self.heard += 1
            call = self.pending.get(number)
            if call is None:  # given up
                return
            out = call.out
        if kind == "block":
            block = call.sink(out, *payload)  # copies, so without the lock
            with self.changed:
                call.blocks.append(block)
                self.changed.notify_all()
            return
        with self.changed:
            self.pending.pop(number, None)
            self.used.pop(call.region, None)
            call.out, call.done = None, True
            if kind == "done":
                call.work = payload
            else:
                call.error = payload
                if call.sink is None:
                    self._fail(payload)
            self.changed.notify_all()


class _Worker:
    """The drive's side: one method for each command. `tell` sends the host a part of the answer."""

    def __init__(self, connection: socket.socket, folder: Path, shape: Shape, settings: Emulation):
        self.connection, self.shape, self.settings = connection, shape, settings
        self.file = RecordFile(folder, shape.record_bytes, shape.streams, shape.batch, settings.threads)
        self.codes = CodeMemory(self.file, shape, settings.dram_bytes, settings.page_bytes)
        self.tails = [np.empty((0, shape.record_bytes), np.uint8) for _ in range(shape.streams)]
        self.flushed = [0] * shape.streams  # records on the file; the rest are in the tail
        self.hot = [np.empty(0, bool) for _ in range(shape.streams)]
        self.totals = {kind: Work() for kind in ("write", "rescale", "evaluate", "fetch")}
        self.hangup = select.poll()
        self.hangup.register(connection, 0)

    def write(self, tell, stream: int, total: int, records: np.ndarray, codes: np.ndarray, _) -> Work:
        meter = self._meter()
        spilled, tail = self.codes.append(stream, codes), np.concatenate((self.tails[stream], records))
        self.hot[stream] = np.append(self.hot[stream], np.ones(len(records), bool))
        whole = len(tail) // self.file.group * self.file.group if len(tail) >= HELD else 0
        if whole:
            self.file.reserve(total)
            self.file.write(stream, self.flushed[stream], tail[:whole])
        self.tails[stream], self.flushed[stream] = tail[whole:].copy(), self.flushed[stream] + whole
        written = whole * self.shape.record_bytes + spilled
        meter.move(link=records.nbytes + codes.nbytes, dram_read=codes.nbytes, nand_write=written)
        return self._count("write", meter)

    def rescale(self, tell, stream: int, doublings: np.ndarray, _) -> Work:
        meter = self._meter()
        moved, held = self.codes.rescale(stream, doublings), self.codes.lengths[stream] * self.shape.code_bytes
        meter.move(link=doublings.nbytes, nand_read=moved, dram_read=2 * held, nand_write=moved)
        return self._count("rescale", meter)

    def hold(self, tell, stream: int, hot: bool, positions: np.ndarray, _) -> None:
        self.hot[stream][positions] = hot

    def evaluate(self, tell, stream: int, block: int, query: np.ndarray, out: np.ndarray) -> Work:
        meter, out, width = self._meter(), out.view(np.int32), 1 + self.shape.kv_heads
        meter.move(link=query.nbytes)
        query, cold = query.astype(np.float32), np.flatnonzero(~self.hot[stream])
        for at in range(0, len(cold), block):
            positions = cold[at : at + block]
            m = len(positions)
            answer = out[at * width : (at + m) * width].reshape(width, m)
            answer[0] = positions
            answer[1:], read = self.codes.scores(stream, query, positions)
            meter.move(nand_read=read, dram_read=m * self.shape.code_bytes, link=answer.nbytes)
            tell("block", (at, m))
        return self._count("evaluate", meter)

    def fetch(self, tell, stream: int, positions: np.ndarray, out: np.ndarray) -> Work:
        meter = self._meter()
        read = self._read(stream, positions, out.reshape(len(positions), self.shape.record_bytes))
        meter.move(nand_read=read, link=out.nbytes)
        tell("block", ())
        return self._count("fetch", meter)

    def truncate(self, tell, stream: int, n: int, _) -> None:
        if n >= len(self.hot[stream]):
            return
        kept = min(self.flushed[stream], n // self.file.group * self.file.group)
        tail = np.empty((n - kept, self.shape.record_bytes), np.uint8)
        self._read(stream, np.arange(kept, n), tail)
        self.tails[stream], self.flushed[stream] = tail, kept
        self.codes.truncate(stream, n)
        self.hot[stream] = self.hot[stream][:n].copy()

    def report(self, tell, _) -> dict[str, Work]:
        return self.totals

    def _read(self, stream: int, positions: np.ndarray, out: np.ndarray) -> int:
        """Records of sorted positions (k,) from file and tail into out (k, record_bytes); the file's bytes read."""
        flushed = self.flushed[stream]
        split = int(np.searchsorted(positions, flushed))
        out[split:] = self.tails[stream][positions[split:] - flushed]
        return self.file.read(stream, positions[:split], out[:split])

    def _count(self, kind: str, meter: Meter) -> Work:
        work = meter.stop()
        self.totals[kind] += work
        return work

    def _meter(self) -> Meter:
        return Meter(self.settings.rates, self._sleep if self.settings.paced else None)

    def _sleep(self, until: float) -> None:
        """Sleep until this time.perf_counter, unless the host goes."""
        while (left := until - time.perf_counter()) > 0:
            if left < 0.002:
                time.sleep(left)
            elif self.hangup.poll(int(left * 1000) - 1):
                raise EOFError


def main(connection: int, memory: int) -> None:
    """The worker: take commands from this socket, with arrays in this memory file, until the host closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host, shared = socket.socket(fileno=connection), mmap.mmap(memory, os.fstat(memory).st_size)
    number = 0

    def tell(kind: str, payload=None) -> None:
        host.send(pickle.dumps((number, kind, payload)))

    with contextlib.suppress(EOFError, ConnectionError):  # the host is gone, and with it whoever could be told
        try:
            worker = _Worker(host, *pickle.loads(host.recv(MESSAGE)))
            tell("done", worker.file.direct)
        except (OSError, ValueError) as error:
            tell("error", str(error))
            return
        while message := host.recv(MESSAGE):
            number, op, args, arrays = pickle.loads(message)
            try:
                arrays = [np.ndarray(shape, dtype, shared, at) for at, shape, dtype in arrays]
                tell("done", getattr(worker, op)(tell, *args, *arrays))
            except (EOFError, ConnectionError):
                raise
            except DriveError as error:
                tell("error", str(error))
            except Exception:
                tell("error", f"the emulated drive failed in {op}: {traceback.format_exc()[-4000:]}")
