"""The emulated drive's own side: the process that keeps the file and the codes, and scores. numpy only."""

import contextlib
import mmap
import os
import select
import signal
import socket
import time
import traceback
from pathlib import Path

import numpy as np

from hillinfer.errors import DriveError
from hillinfer.systems.hillinfer import wire
from hillinfer.systems.hillinfer.drive import CodeMemory, Meter, Rates, Shape, Work
from hillinfer.systems.hillinfer.remote import Emulation
from hillinfer.tiers.record_file import RecordFile

PART = 1024  # records that attention reads at once
HELD = 64  # records gathered in memory before a write: one large write beats many of one block


class Worker:
    """The drive's side: one method for each command. `tell` sends the host a part of the answer."""

    def __init__(self, connection: socket.socket | None, folder: Path, shape: Shape, settings: Emulation):
        self.connection, self.shape, self.settings = connection, shape, settings
        self.file = RecordFile(
            folder,
            shape.record_bytes,
            shape.streams,
            shape.batch,
            settings.threads,
            settings.engine,
            checksums=settings.checksums,
            timeout=settings.timeout / 2,  # so that its word, which names the place, comes before the host gives up
        )
        self.codes = self._memory()
        self.tails = [np.empty((0, shape.record_bytes), np.uint8) for _ in range(shape.streams)]
        self.flushed = [0] * shape.streams  # records on the file; the rest are in the tail
        self.hot = [np.empty(0, bool) for _ in range(shape.streams)]
        self.totals = {kind: Work() for kind in ("write", "rescale", "evaluate", "attend", "fetch")}
        self.hangup = select.poll()
        if connection is not None:
            self.hangup.register(connection, 0)

    def _memory(self) -> CodeMemory:
        return CodeMemory(self.file, self.shape, self.settings.dram_bytes, self.settings.page_bytes)

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
        meter.wait("kernel", self.settings.rates.call)
        cold = np.flatnonzero(~self.hot[stream])
        for at in range(0, len(cold), block):
            positions = cold[at : at + block]
            m = len(positions)
            answer = out[at * width : (at + m) * width].reshape(width, m)
            answer[0] = positions
            answer[1:], read = self.codes.scores(stream, query, positions)
            codes = m * self.shape.code_bytes
            meter.move(nand_read=read, dram_read=codes, kernel=codes, link=answer.nbytes)
            tell("block", (at, m))
        return self._count("evaluate", meter)

    def fetch(self, tell, stream: int, positions: np.ndarray, out: np.ndarray) -> Work:
        meter = self._meter()
        read = self._read(stream, positions, out.reshape(len(positions), self.shape.record_bytes))
        meter.move(nand_read=read, link=out.nbytes)
        tell("block", ())
        return self._count("fetch", meter)

    def attend(self, tell, stream: int, dtype: str, query: np.ndarray, runs: np.ndarray, out: np.ndarray) -> Work:
        """Exact attention with a running softmax (the online softmax of FlashAttention): one pass over the records."""
        meter, heads, dim = self._meter(), *query.shape[::2]
        meter.move(link=query.nbytes)
        top = np.full((*query.shape[:2], 1), -np.inf, np.float32)
        total, output = np.zeros_like(top), np.zeros_like(query)
        for start, end in runs:
            for at in range(start, end, PART):
                raw = np.empty((min(PART, end - at), self.shape.record_bytes), np.uint8)
                read = self._read(stream, np.arange(at, at + len(raw)), raw)
                meter.move(nand_read=read)
                keys, values = _floats(raw, dtype).reshape(len(raw), 2, heads, dim).transpose(1, 2, 0, 3)
                logits = query @ keys.transpose(0, 2, 1)
                new = np.maximum(top, logits.max(2, keepdims=True))
                weights, fade = np.exp(logits - new), np.exp(top - new)
                total = total * fade + weights.sum(2, keepdims=True)
                output, top = output * fade + weights @ values, new
        with np.errstate(divide="ignore"):
            answer = np.concatenate((output / np.maximum(total, 1e-30), top + np.log(total)), 2)
        out[:] = answer.astype(np.float32).view(np.uint8).ravel()
        meter.move(link=out.nbytes)
        tell("block", ())
        return self._count("attend", meter)

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


def _floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of this dtype as float32. numpy has no bfloat16: it is the upper half of a float32."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def _config(about: dict) -> tuple[Path, Shape, Emulation]:
    settings = about["settings"] | {"rates": Rates(**about["settings"]["rates"])}
    return Path(about["folder"]), Shape(**about["shape"]), Emulation(**settings)


def main(connection: int, memory: int) -> None:
    """The worker: take commands from this socket, with arrays in this memory file, until the host closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host, shared = socket.socket(fileno=connection), mmap.mmap(memory, os.fstat(memory).st_size)
    number = 0

    def tell(kind: str, payload=None) -> None:
        host.send(wire.answer(number, kind, payload))

    with contextlib.suppress(EOFError, ConnectionError):  # the host is gone, and with it whoever could be told
        try:
            worker = Worker(host, *_config(wire.unpack(host.recv(wire.MESSAGE))[1]))
            tell("done", worker.file.direct)
        except (OSError, ValueError) as error:
            tell("error", str(error))
            return
        while message := host.recv(wire.MESSAGE):
            number, op, args, arrays = wire.command(message, len(shared))
            try:
                arrays = [np.ndarray(shape, dtype, shared, at) for at, shape, dtype in arrays]
                tell("done", getattr(worker, op)(tell, *args, *arrays))
            except (EOFError, ConnectionError):
                raise
            except DriveError as error:
                tell("error", str(error))
            except Exception:
                tell("error", f"the emulated drive failed in {op}: {traceback.format_exc()[-4000:]}")
