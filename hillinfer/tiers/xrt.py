"""A SmartSSD through the Xilinx Runtime: `XrtDrive` speaks `ComputationalDrive`, fpga/rtl/cec_kernel.v scores.

Key codes lie in the FPGA's DRAM in pages; those that do not fit are on the drive, and come from its flash straight into
a mapped FPGA buffer (P2P) in reads of 1 MiB. Two runs are under way at once: while the kernel scores a page, the
next one is read and the last answer taken in. Records go to a file on the card's own flash, and are read from there.

Only what pyxrt has had from XRT 2021.1 on is used: `kernel` with four arguments, `sync` with three, `run.set_arg` with
buffers and C ints. `run.wait` would hold the interpreter's lock, so `run.state` is polled. No card was ever here: what
ran is this code on a simulated kernel (tests/fake_pyxrt.py).
"""

import os
import queue
import re
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hillinfer.tiers.computational import CodeMemory, Shape, Work
from hillinfer.tiers.emulated import Emulation, RemoteDrive, _Call
from hillinfer.tiers.record_file import BLOCK, MAX_READ, DriveError, RecordFile
from hillinfer.tiers.worker import Worker

KERNEL = "cec_kernel"
HEADER, ALL = 64, 2  # bytes before a head's scores; the mode in which every score is sent
STATUS = "more tokens than it holds, misaligned buffers, a bad argument, a failed read, a failed write, a query of -128"
NO_P2P = "P2P is off: xbutil configure --p2p enable (and Above-4G decoding in the BIOS), then a warm reboot"
NAME = re.compile(r"int(?P<bits>[48])-d(?P<head_dim>\d+)-g(?P<group>\d+)-l(?P<lanes>\d+)(-n(?P<nmax>\d+))?")


@dataclass(frozen=True)
class Xrt(Emulation):
    """How a card is used. `rates` give the report's modelled time beside the measured one."""

    xclbin: Path | None = None  # its name holds the kernel's parameters, as int8-d128-g4-l64
    bits: int = 8  # of the codes that will come
    device: int = 0
    page_bytes: int = 8 << 20
    timeout: float = 10.0  # seconds for one run of the kernel


class Card:
    """Device, kernel and the buffers of two runs. Errors say what is missing."""

    def __init__(self, settings: Xrt, shape: Shape):
        xclbin = check_card(settings.xclbin, settings.device)
        values = NAME.search(xclbin.name).groupdict(131_072).values()
        self.bits, self.head_dim, self.group, _, self.nmax = map(int, values)
        if shape.head_dim > self.head_dim or settings.bits > self.bits:
            raise DriveError(
                f"{xclbin.name} scores INT{self.bits} codes of up to {self.head_dim} channels, not "
                f"INT{settings.bits} of {shape.head_dim}: link a kernel for them (make -C fpga link)"
            )
        self.settings, self.heads, self.token_bytes = settings, shape.kv_heads, self.head_dim * self.bits // 8
        self.xrt, self.device = open_device(settings.device)
        try:
            uuid = self.device.load_xclbin(str(xclbin))
        except RuntimeError as error:
            raise DriveError(
                f"the card refuses {xclbin.name} ({error}): wrong shell? It must be linked for the platform that "
                "xbutil examine names"
            ) from None
        try:
            self.kernel = self.xrt.kernel(self.device, uuid, KERNEL, self.xrt.kernel.shared)
        except RuntimeError as error:
            raise DriveError(f"{xclbin.name} has no {KERNEL} ({error}); link it again (make -C fpga link)") from None

    def reserve(self, slot: int, page: int) -> None:
        """Buffers for pages of `slot` bytes and `page` tokens."""
        self.page, self.out_stride = page, HEADER + -(-8 * page // 64) * 64
        self.query = self.buffer(self.heads * self.group * self.head_dim, "normal", 1)
        self.outs = [self.buffer(self.heads * self.out_stride, "normal", 2) for _ in range(2)]
        self.stages = [self.buffer(slot, "p2p", 0) for _ in range(2)]
        self.runs = [self.xrt.run(self.kernel) for _ in range(2)]

    def buffer(self, nbytes: int, kind: str, argument: int) -> "Buffer":
        """Memory of the card for a kernel argument, mapped."""
        size = -(-nbytes // BLOCK) * BLOCK
        try:
            bo = self.xrt.bo(self.device, size, getattr(self.xrt.bo, kind), self.kernel.group_id(argument))
            mapped = bo.map()
        except RuntimeError as error:
            why = NO_P2P if kind == "p2p" else "its memory is full: lower dram_bytes"
            raise DriveError(f"no {kind} buffer of {size:,} bytes on the card ({error}); {why}") from None
        buffer = np.frombuffer(mapped, np.uint8)[:nbytes].view(Buffer)
        buffer.bo = bo
        return buffer

    def push(self, buffer: "Buffer", start: int, end: int) -> None:
        """Bytes start..end, widened to whole blocks, to the device."""
        start, end = start // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, -(-len(buffer) // BLOCK) * BLOCK)
        buffer.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, end - start, start)

    def ask(self, query: np.ndarray) -> None:
        """The query (Hkv, G, D) int8 of the runs to come; missing heads of a group repeat its first."""
        heads, group, dim = query.shape
        if group > self.group:
            raise DriveError(
                f"{self.settings.xclbin.name} scores groups of {self.group} query heads and this model has {group}: "
                f"link a kernel for {group} (make -C fpga link GROUP={group})"
            )
        whole = np.zeros((heads, self.group, self.head_dim), np.int8)
        whole[:, :, :dim] = query[:, :1]
        whole[:, :group, :dim] = query
        self.query[:] = whole.view(np.uint8).reshape(-1)
        self.push(self.query, 0, len(self.query))

    def start(self, slot: int, keys: "Buffer", first: int, n: int) -> None:
        """Score tokens first.. of a page; `slot`, 0 or 1, says which of the two runs."""
        out, run = self.outs[slot], self.runs[slot]
        for head in range(self.heads):  # so that no header of an earlier run can vouch for this one
            at = head * self.out_stride
            out[at : at + 16] = 0xFF
            out.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, HEADER, at)
        scalars = (first, n, n, self.heads, ALL, self.page * self.token_bytes, self.out_stride)
        for index, argument in enumerate((keys.bo, self.query.bo, out.bo, *map(int, scalars))):
            run.set_arg(index, argument)
        run.start()

    def finish(self, slot: int, n: int) -> np.ndarray:
        """The scores (Hkv, n) of a run, once it is over."""
        states, until, nap = self.xrt.ert_cmd_state, time.monotonic() + self.settings.timeout, 2e-5
        while (state := self.runs[slot].state()) != states.ERT_CMD_STATE_COMPLETED:
            if state in (states.ERT_CMD_STATE_ERROR, states.ERT_CMD_STATE_ABORT, states.ERT_CMD_STATE_TIMEOUT):
                raise DriveError(f"the card ended a run with {state}; see dmesg, then xbutil reset")
            if time.monotonic() > until:
                raise DriveError(
                    f"the card gave no answer for {self.settings.timeout:g} s; xbutil reset brings it back"
                )
            time.sleep(nap)
            nap = min(2 * nap, 1e-3)
        out = self.outs[slot]
        out.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE, self.heads * self.out_stride, 0)
        words = out.view(np.ndarray).view(np.int32).reshape(self.heads, -1)
        bad = words[(words[:, 2] != 0) | (words[:, 0] != n)]
        if len(bad):
            texts = [text for i, text in enumerate(STATUS.split(", ")) if bad[0, 2] >> i & 1 and bad[0, 2] >= 0]
            raise DriveError(
                f"the kernel scored {bad[0, 0]} of {n} tokens: {' and '.join(texts) or 'no answer written'}"
            )
        return words[:, HEADER // 4 :].reshape(self.heads, -1, 2)[:, :n, 1]


class Buffer(np.ndarray):
    """Mapped memory of the card. The map does not keep its buffer object alive, so this does."""

    bo = None
    dirty = (0, 0)  # tokens that the device does not have yet


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

    def send(self, op: str, *args, give: tuple[np.ndarray, ...] = (), take: int = 0, sink=None) -> _Call:
        """See `_Link.send` of the emulated drive."""
        call = _Call(self, out=np.empty(take, np.uint8), sink=sink)
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

            def tell(kind: str, payload, call: _Call = call) -> None:
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


def open_device(index: int = 0) -> tuple:
    """pyxrt and a device of it, or DriveError with all that is missing here."""
    try:
        import pyxrt
    except ImportError as error:
        raise DriveError(
            f"drive_kind xrt needs XRT's Python binding, which does not load ({error}): install XRT, run `source "
            f"/opt/xilinx/xrt/setup.sh`, use the Python it was built for. {find_card()}. Without a SmartSSD use "
            "drive_kind emulated"
        ) from None
    try:
        return pyxrt, pyxrt.device(index)
    except RuntimeError as error:
        raise DriveError(f"XRT finds no device {index} ({error}). {find_card()}; see xbutil examine") from None


def check_card(path: str | Path | None, device: int = 0) -> Path:
    """The kernel's file, by setting or environment; its name holds its parameters. DriveError says what is missing."""
    open_device(device)
    path = path or os.environ.get("HILLINFER_XCLBIN")
    if not path:
        raise DriveError("no kernel for the card was named: --xclbin FILE (make -C fpga link makes it)")
    path = Path(path)
    if not path.is_file():
        raise DriveError(f"there is no xclbin {path}: make -C fpga link makes one, --xclbin FILE names it")
    if not NAME.search(path.name):
        raise DriveError(f"{path.name} does not say what kernel it holds: keep the name from make -C fpga link")
    return path


def find_card() -> str:
    """Whether a Xilinx card is on the PCI bus, in words."""
    vendors = [vendor.read_text().strip() for vendor in Path("/sys/bus/pci/devices").glob("*/vendor")]
    cards = vendors.count("0x10ee")
    return (
        f"{cards} PCI functions of Xilinx are here" if cards else "There is no PCI device of Xilinx (vendor 10ee) here"
    )
