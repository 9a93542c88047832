"""The host's side of a computational drive at the other end of a link: `ComputationalDrive` as commands with arrays.

The emulated drive's link leads to a process, a SmartSSD's to a thread. numpy only.
"""

import queue
import weakref
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hillinfer.errors import DriveError
from hillinfer.systems.hillinfer.drive import SMARTSSD, Rates, ScoreBlock, Shape, Work

CHUNK = 8 << 20  # bytes of records that one command moves, or a quarter of the shared memory if that is less


@dataclass(frozen=True)
class Emulation:
    """How a drive is emulated. `rates` give the report's modelled time; with `paced`, operations take at least that."""

    dram_bytes: int = 4 << 30  # for key codes, as a SmartSSD has; codes beyond it spill to the file
    page_bytes: int = 1 << 20  # of codes, read from the file at once
    rates: Rates = SMARTSSD
    paced: bool = False
    threads: int = 16  # that read and write the file, where io_uring does not
    engine: str = "auto"  # of `BlockFile`
    shared_bytes: int = 64 << 20  # for what is under way between host and worker; used only as far as needed
    timeout: float = 60.0  # seconds without an answer after which the worker counts as dead
    checksums: bool = True  # of `BlockFile`


class Link(Protocol):
    """What carries commands to a drive and answers back."""

    direct: bool  # whether the drive reads around the page cache

    def send(self, op: str, *args, give: tuple[np.ndarray, ...] = (), take: int = 0, sink=None) -> "Call":
        """Send a command with arrays, and room for `take` bytes of answer. What the drive says of that room goes
        through `sink(out, ...)`. A command without a sink, which nobody waits for, fails the drive if it fails.
        """

    def receive(self, answers: queue.SimpleQueue) -> tuple[str, object]:
        """The next of these answers, (kind, value), within the link's time."""

    def close(self) -> None: ...


class RemoteDrive:
    """`ComputationalDrive` at the other end of a link. Any thread may call it, but a stream has one writer."""

    def __init__(self, shape: Shape, settings: Emulation, link: Link):
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

    def begin_evaluate(self, stream: int, query: np.ndarray, block: int = 1024) -> "Call":
        _check("query", query, (self.shape.kv_heads, max(1, query.shape[1]), self.shape.head_dim), np.int8)
        if block < 1:
            raise ValueError(f"a score block of {block} tokens is none")
        width = 1 + self.shape.kv_heads  # int32 for each token: its position and its scores

        def sink(out: np.ndarray, at: int, m: int) -> ScoreBlock:
            both = out.view(np.int32)[at * width : (at + m) * width].reshape(width, m).copy()
            return ScoreBlock(both[0], both[1:])

        take = 4 * width * self._lengths[stream]
        return self._link.send("evaluate", stream, block, give=(query,), take=take, sink=sink)

    def evaluate(self, stream: int, query: np.ndarray, block: int = 1024) -> "Call":
        return self.begin_evaluate(stream, query, block)

    def begin_fetch(self, stream: int, positions: np.ndarray) -> "Reading":
        positions, width = self._positions(stream, positions), self.shape.record_bytes
        records = np.empty((len(positions), width), np.uint8)
        step, calls = max(1, self._chunk // width), []
        for start in range(0, max(1, len(positions)), step):
            part = records[start : start + step]

            def sink(out: np.ndarray, part: np.ndarray = part) -> None:
                part[:] = out.reshape(part.shape)

            give = (positions[start : start + step],)
            calls.append(self._link.send("fetch", stream, give=give, take=part.nbytes, sink=sink))
        return Reading(calls, records)

    def fetch(self, stream: int, positions: np.ndarray) -> np.ndarray:
        return self.begin_fetch(stream, positions).result()

    def begin_attend(self, stream: int, query: np.ndarray, runs: np.ndarray, dtype: str) -> "Attending":
        out = np.empty((*query.shape[:2], query.shape[2] + 1), np.float32)

        def sink(answer: np.ndarray) -> None:
            out[:] = answer.view(np.float32).reshape(out.shape)

        give = (np.ascontiguousarray(query, np.float32), np.asarray(runs, np.int64).reshape(-1, 2))
        return Attending([self._link.send("attend", stream, dtype, give=give, take=out.nbytes, sink=sink)], out)

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


class Call:
    """One command under way, and what the worker has answered so far; of an evaluation, the protocol's `Evaluation`."""

    def __init__(self, link: Link, region: int | None = None, out: np.ndarray | None = None, sink=None):
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


class Reading:
    """The protocol's `Fetch`."""

    def __init__(self, calls: list[Call], records: np.ndarray):
        self._calls, self._records, self.work = calls, records, None

    def result(self) -> np.ndarray:
        self.work = sum((call.end() for call in self._calls), Work())
        return self._records


class Attending(Reading):
    def result(self) -> tuple[np.ndarray, np.ndarray]:
        out = super().result()
        return out[..., :-1], out[..., -1:]
