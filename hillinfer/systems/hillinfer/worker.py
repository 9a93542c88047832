"""The drive's side of a computational drive: a thread that runs its commands in order."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from hillinfer import attention, native
from hillinfer.errors import DriveError
from hillinfer.systems.hillinfer.codes_memory import CodeMemory
from hillinfer.systems.hillinfer.protocol import Emulation, Meter, ScoreBlock, Shape, Work
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import RecordLog
from hillinfer.tiers.record_file import RecordFile

CHUNK = 8 << 20  # bytes of records and codes written or attended to at once
QUEUED = 64 << 20  # bytes of records and codes in queued commands; more would defeat the memory budget
AWAITED = ("evaluate", "fetch", "attend", "report")  # commands with a result: their errors are raised to the caller
CLOSED = "the drive is closed"
Memory = Callable[[RecordFile], CodeMemory]


class Command:
    """A command in progress: iterate over the score blocks of an evaluation, or wait for the `result` of another
    command. `work` is set at its end.
    """

    def __init__(self, kind: str, args: tuple, nbytes: int):
        self.kind, self.args, self.nbytes = kind, args, nbytes
        self.value = self.work = self.error = None
        self.over = False
        # No Condition or Future: Ctrl-C inside their Python code can leave them locked. SimpleQueue is C.
        self.blocks: queue.SimpleQueue[ScoreBlock | None] = queue.SimpleQueue()

    def __iter__(self) -> "Command":
        return self

    def __next__(self) -> ScoreBlock:
        # Once over, an empty queue means that the end marker was taken: do not wait for it again.
        if not (self.over and self.blocks.empty()) and (block := self.blocks.get()) is not None:
            return block
        if self.error:
            raise DriveError(self.error)
        raise StopIteration

    def result(self):
        """Wait for the end and return the value. Raises DriveError."""
        for _ in self:
            pass
        return self.value

    def end(self, value=None, work: Work | None = None, error: str | None = None) -> None:
        self.value, self.work, self.error, self.args = value, work, error, ()
        self.over = True
        self.blocks.put(None)


class Worker:
    """Records, codes, and a thread that serves the commands: one method each, with a `Meter` as first argument.

    memory   constructor of the `CodeMemory` over the drive's file
    """

    def __init__(self, folder: Path, shape: Shape, settings: Emulation, memory: Memory):
        if not folder.is_dir():
            raise DriveError(f"the drive folder {folder} does not exist")
        self.shape, self.settings = shape, settings
        self.chunk = max(1, CHUNK // (shape.record_bytes + shape.code_bytes))  # tokens
        sizes = shape.record_bytes, shape.streams, shape.batch
        safety = dict(checksums=settings.checksums, timeout=settings.timeout)
        self.file = RecordFile(folder, *sizes, settings.threads, settings.engine, **safety)
        try:
            self.codes = memory(self.file)
        except BaseException:
            self.file.close()
            raise
        raw = Geometry(shape.batch, 1, shape.record_bytes // 2, torch.uint8, torch.device("cpu"))  # bytes, K and V
        self.logs = [RecordLog(self.file, raw, stream) for stream in range(shape.streams)]
        self.hot = [np.empty(0, bool) for _ in range(shape.streams)]
        self.totals = {kind: Work() for kind in ("write", "rescale", "evaluate", "attend", "fetch")}
        self.failure: str | None = None  # raised by every later call
        self.closed, self.queued = False, 0
        self.process = os.getpid()  # Thread.is_alive() would not do: Ctrl-C inside it can mark a live thread as stopped
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.lock = threading.RLock()  # reentrant: the collector may close a drive from either thread
        self.thread = threading.Thread(target=self._serve, name="hillinfer-worker", daemon=True)
        self.thread.start()

    def submit(self, kind: str, *args, nbytes: int = 0) -> Command:
        """Queue a command. Blocks while more than QUEUED bytes are waiting. Raises DriveError."""
        command = Command(kind, args, nbytes)
        while True:
            if os.getpid() != self.process:
                raise DriveError("the drive belongs to the process that opened it, not to its fork")
            with self.lock:
                if self.failure:
                    raise DriveError(self.failure)
                if self.queued <= 0 or self.queued + nbytes <= QUEUED:
                    self.commands.put(command)
                    self.queued += nbytes
                    return command
            time.sleep(0.001)

    def close(self) -> None:
        """Fail queued commands, finish the current step of the running one, and release the file."""
        if os.getpid() != self.process:  # a forked process has no such thread
            return
        with self.lock:
            self.failure, self.closed = self.failure or CLOSED, True
            self.commands.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _serve(self) -> None:
        while (command := self.commands.get()) is not None:
            self._run(command)
            with self.lock:
                self.queued -= command.nbytes
            command = None  # only the caller keeps its result alive
        self.file.close()

    def _run(self, command: Command) -> None:
        try:
            if self.failure:
                raise DriveError(self.failure)
            meter = Meter(self.settings.rates, self._pace)
            value = getattr(self, command.kind)(meter, *command.args)
            if command.kind == "evaluate":
                for block in value:
                    command.blocks.put(block)
            work = meter.stop()
            if command.kind in self.totals:
                self.totals[command.kind] += work
            command.end(value, work)
        except Exception as error:
            text = str(error) if isinstance(error, DriveError) else f"the drive failed in {command.kind}: {error!r}"
            if command.kind not in AWAITED:
                self.failure = self.failure or text
            command.end(error=text)

    def _pace(self, until: float) -> None:
        """Sleep until this time.perf_counter if paced. DriveError once the drive is closed."""
        while True:
            if self.closed:
                raise DriveError(CLOSED)
            left = until - time.perf_counter()
            if not self.settings.paced or left <= 0:
                return
            time.sleep(min(left, 0.01))

    def write(self, meter: Meter, stream: int, total: int, records: np.ndarray, codes: np.ndarray) -> None:
        spilled, log = self.codes.append(stream, codes), self.logs[stream]
        if log.fills(len(records)):
            self.file.reserve(total)  # all parts of a long write in one segment
        written = log.append(torch.from_numpy(records).view(-1, *log.geometry.record_shape))
        self.hot[stream] = np.append(self.hot[stream], np.ones(len(records), bool))
        meter.move(link=records.nbytes + codes.nbytes, dram_read=codes.nbytes, nand_write=written + spilled)

    def rescale(self, meter: Meter, stream: int, doublings: np.ndarray) -> None:
        moved, held = self.codes.rescale(stream, doublings), self.codes.lengths[stream] * self.shape.code_bytes
        meter.move(link=doublings.nbytes, nand_read=moved, dram_read=2 * held, nand_write=moved)

    def hold(self, meter: Meter, stream: int, positions: np.ndarray, hot: bool) -> None:
        self.hot[stream][positions] = hot

    def evaluate(self, meter: Meter, stream: int, query: np.ndarray, block: int) -> Iterator[ScoreBlock]:
        meter.move(link=query.nbytes)
        meter.free["kernel"] = self.settings.rates.call
        cold = np.flatnonzero(~self.hot[stream]).astype(np.int32)
        ready, done = np.empty((query.shape[0] * query.shape[1], 0), np.int32), 0  # scores to send, and the number sent
        read = codes = 0
        for part in self.codes.scores(stream, query, cold, block):  # parts end at pages, score blocks do not
            ready, read, codes = np.concatenate((ready, part.scores), 1), read + part.read, codes + part.codes
            last = done + ready.shape[1] == len(cold)
            while ready.shape[1] >= block or (last and ready.shape[1]):
                out = ScoreBlock(cold[done : done + block], ready[:, :block])
                link = out.positions.nbytes + out.scores.nbytes
                meter.move(nand_read=read, dram_read=codes, kernel=codes, link=link)
                yield out
                ready, done, read, codes = ready[:, block:], done + block, 0, 0

    def fetch(self, meter: Meter, stream: int, positions: np.ndarray) -> np.ndarray:
        log = self.logs[stream]
        records, nbytes = log.read(positions)
        out = log.geometry.as_bytes(records.tensor())
        meter.move(nand_read=nbytes, link=out.nbytes)  # one read: deepest queue
        return out

    def attend(
        self, meter: Meter, stream: int, query: np.ndarray, runs: np.ndarray, dtype: str, softcap: float
    ) -> tuple:
        """Exact attention in chunks, merged by their logsumexp as in FlashAttention."""
        log, whole = self.logs[stream], torch.from_numpy(query)
        parts = [(torch.zeros_like(whole), whole.new_full(whole.shape[:2], -torch.inf))]
        meter.move(link=query.nbytes)
        for start, end in runs.tolist():
            for at in range(start, end, self.chunk):
                records, nbytes = log.read(np.arange(at, min(at + self.chunk, end)))
                meter.move(nand_read=nbytes)
                parts = [attention.merge([*parts, attend(whole, records.tensor(), dtype, softcap)])]
        ((out, logsumexp),) = parts
        meter.move(link=out.nbytes + logsumexp.nbytes)
        return out, logsumexp

    def truncate(self, meter: Meter, stream: int, n: int) -> None:
        if n < len(self.hot[stream]):
            self.logs[stream].truncate(n)
            self.codes.truncate(stream, n)
            self.hot[stream] = self.hot[stream][:n].copy()

    def report(self, meter: Meter) -> dict[str, Work]:
        return dict(self.totals)


def attend(
    query: torch.Tensor, records: torch.Tensor, dtype: str, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a scaled query (Hkv, G, D) float32 over raw records (n, ...) of K (Hkv, D), V (Hkv, D) in this
    dtype: (Hkv, G, D) and the logsumexp (Hkv, G). The kernel runs on one thread, so as not to slow the model's.
    """
    heads, group, dim = query.shape
    if native.available() and dim <= native.MAX_DIM:
        out, logsumexp = torch.empty_like(query), query.new_empty((heads, group))
        rows = [(native.pointer(records), records[0].nbytes, len(records))]
        native.attend(query.view(1, -1, dim), rows, dtype, heads, 1.0, out, logsumexp, softcap=softcap)
        return out, logsumexp
    kv = records.flatten(1).view(getattr(torch, dtype)).view(1, len(records), 2, heads, dim).float()
    out, logsumexp = attention.over_tensors(query.view(1, -1, 1, dim), kv, None, 1.0, softcap)
    return out.view(query.shape), logsumexp.view(heads, group)
