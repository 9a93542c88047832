"""A SmartSSD as a computational drive: `XrtDrive` speaks `ComputationalDrive`, fpga/rtl/cec_kernel.v scores.

Key codes lie in the FPGA's DRAM in pages; those that do not fit are on the drive, and come from its flash straight into
a mapped FPGA buffer (P2P) in reads of 1 MiB. Two runs are under way at once: while the kernel scores a page, the
next one is read and the last answer taken in. Records go to a file on the card's own flash, and are read from there.

No card was ever here: what ran is this code on a simulated kernel (tests/fake_pyxrt.py).
"""

import queue
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hillinfer.errors import DriveError
from hillinfer.systems.hardware.card import Buffer, Card, Xrt
from hillinfer.systems.hillinfer.drive import CodeMemory, Shape, Work
from hillinfer.systems.hillinfer.remote import Call, RemoteDrive
from hillinfer.systems.hillinfer.worker import Worker
from hillinfer.tiers.block_file import BLOCK, MAX_READ
from hillinfer.tiers.record_file import RecordFile


class CardMemory(CodeMemory):
    """Codes in the kernel's own form: channels padded to its head_dim, INT4 two to a byte."""

    def __init__(self, file: RecordFile, shape: Shape, settings: Xrt, card: Card):
        self.card, self.plain_dim = card, shape.head_dim
        stored = replace(shape, head_dim=card.token_bytes)
        page = max(2, min(settings.page_bytes // stored.code_bytes, card.nmax) // 2 * 2)
        slot = -(-page * stored.code_bytes // BLOCK) * BLOCK
        super().__init__(file, stored, settings.dram_bytes - 3 * slot, page * stored.code_bytes)
        card.reserve(self.slot, self.page)

    def allocate(self) -> Buffer:
        return self.card.buffer(self.slot, "normal", 0)

    def append(self, stream: int, codes: np.ndarray) -> int:
        before = self.lengths[stream]
        spilled = super().append(stream, self._pack(codes))
        self._touch(stream, before, self.lengths[stream])
        return spilled

    def rescale(self, stream: int, doublings: np.ndarray) -> int:
        moved = super().rescale(stream, doublings)
        self._touch(stream, 0, self.lengths[stream])
        return moved

    def rescaled(self, codes: np.ndarray, factor: np.ndarray) -> np.ndarray:
        if self.card.bits == 4:
            codes = np.stack(((codes << 4) >> 4, codes >> 4), -1).reshape(*codes.shape[:2], -1)
        return self._pack(np.rint(codes[..., : self.plain_dim] / factor).astype(np.int8))

    def truncate(self, stream: int, n: int) -> None:
        super().truncate(stream, n)
        self._touch(stream, n // self.page * self.page, n)

    def begin_scores(self, slot: int, stream: int, index: int, first: int, end: int) -> int:
        """Start a run over tokens first..end of a page. Returns the bytes read from the drive."""
        page = self.pages[stream][index]
        if isinstance(page, int):
            stage = self.card.stages[slot]
            jobs = [(page + at, stage[at : at + MAX_READ]) for at in range(0, self.slot, MAX_READ)]
            self.file.transfer("read", jobs, stream, index * self.page, verify=False)  # the bytes stay on the card
            self.card.start(slot, stage, first, end - first)
            return self.slot
        low, high = page.dirty
        if low < end and first < high:
            for head in range(self.shape.kv_heads):
                at, width = head * self.page * self.card.token_bytes, self.card.token_bytes
                self.card.push(page, at + low * width, at + high * width)
            page.dirty = (0, 0)
        self.card.start(slot, page, first, end - first)
        return 0

    def _touch(self, stream: int, start: int, end: int) -> None:
        """Tokens start..end changed in host memory."""
        for index in range(start // self.page, -(-end // self.page)):
            page = self.pages[stream][index]
            if not isinstance(page, int):
                low, high = max(0, start - index * self.page), min(self.page, end - index * self.page)
                was = page.dirty if page.dirty[1] else (low, high)
                page.dirty = min(low, was[0]), max(high, was[1])

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        out = np.zeros((*codes.shape[:2], self.card.head_dim), np.int8)
        out[..., : codes.shape[2]] = codes
        return out if self.card.bits == 8 else (out[..., 0::2] & 15) | (out[..., 1::2] << 4)


class CardWorker(Worker):
    """`Worker` with the codes on a card, which scores them."""

    def __init__(self, folder: Path, shape: Shape, settings: Xrt):
        self.card, self.file = Card(settings, shape), None
        try:
            super().__init__(None, folder, shape, settings)
        except BaseException:
            if self.file is not None:
                self.file.close()
            raise

    def _memory(self) -> CardMemory:
        return CardMemory(self.file, self.shape, self.settings, self.card)

    def evaluate(self, tell, stream: int, block: int, query: np.ndarray, out: np.ndarray) -> Work:
        meter, out, width, page = self._meter(), out.view(np.int32), 1 + self.shape.kv_heads, self.codes.page
        cold = np.flatnonzero(~self.hot[stream])
        self.card.ask(query)
        meter.move(link=query.nbytes)
        cuts = np.searchsorted(cold, np.arange(len(self.codes.pages[stream]) + 1) * page)
        jobs = [(i, cold[a:b] - i * page) for i, (a, b) in enumerate(pairwise(cuts)) if a < b]
        done = 0

        def take_in(slot: int, rows: np.ndarray, first: int, end: int) -> None:
            nonlocal done
            scores = self.card.finish(slot, end - first)[:, rows - first]
            for at in range(0, len(rows), block):  # into the caller's blocks, which do not end where pages do
                part = scores[:, at : at + block]
                while part.shape[1]:
                    start = done // block * block
                    m = min(block, len(cold) - start)
                    answer = out[start * width : (start + m) * width].reshape(width, m)
                    n = min(part.shape[1], start + m - done)
                    answer[0, done - start : done - start + n] = cold[done : done + n]
                    answer[1:, done - start : done - start + n] = part[:, :n]
                    part, done = part[:, n:], done + n
                    if done == start + m:
                        meter.move(link=answer.nbytes)
                        tell("block", (start, m))

        under_way = None
        for number, (index, rows) in enumerate(jobs):
            slot, first, end = number % 2, int(rows[0]) // 2 * 2, int(rows[-1]) + 1  # two tokens may share a beat
            read = self.codes.begin_scores(slot, stream, index, first, end)
            scored = (end - first) * self.codes.shape.code_bytes
            meter.move(nand_read=read, dram_read=scored, kernel=scored)
            if under_way:
                take_in(*under_way)
            under_way = slot, rows, first, end
        if under_way:
            take_in(*under_way)
        return self._count("evaluate", meter)


class XrtDrive(RemoteDrive):
    """A SmartSSD; `folder` is on its own flash. DriveError says what is missing: pyxrt, xclbin, card, shell, P2P."""

    def __init__(self, folder: Path, shape: Shape, settings: Xrt):
        super().__init__(shape, settings, _Thread(CardWorker(folder, shape, settings)))


class _Thread:
    """The link to a worker in a thread of its own: commands in the order they came. XRT itself does the waiting."""

    def __init__(self, worker: Worker):
        self.direct, self.failure, self.lock = worker.file.direct, None, threading.Lock()
        self.commands: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, args=(worker,), name="hillinfer-xrt", daemon=True)
        self.thread.start()

    def send(self, op: str, *args, give: tuple[np.ndarray, ...] = (), take: int = 0, sink=None) -> Call:
        """See `Link.send`."""
        call = Call(self, out=np.empty(take, np.uint8), sink=sink)
        with self.lock:
            if self.failure:
                raise DriveError(self.failure)
            self.commands.put((call, op, args, [np.array(array) for array in give]))
        return call

    def receive(self, answers: queue.SimpleQueue):
        return answers.get()  # always comes: the worker limits its own waiting

    def close(self) -> None:
        with self.lock:
            self.failure = self.failure or "the drive is closed"
            self.commands.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _serve(self, worker: Worker) -> None:
        while (command := self.commands.get()) is not None:
            call, op, args, arrays = command

            def tell(kind: str, payload, call: Call = call) -> None:
                call.answers.put((kind, call.sink(call.out, *payload)))

            try:
                if self.failure:
                    raise DriveError(self.failure)
                call.answers.put(("done", getattr(worker, op)(tell, *args, *arrays, call.out)))
            except Exception as error:
                text = str(error) if isinstance(error, DriveError) else f"the drive failed in {op}: {error!r}"
                if call.sink is None:
                    with self.lock:
                        self.failure = self.failure or text
                call.answers.put(("error", text))
        worker.file.close()
