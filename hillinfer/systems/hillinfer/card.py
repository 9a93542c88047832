"""A SmartSSD's FPGA through the Xilinx Runtime: device, kernel, mapped buffers, runs. Errors name the missing piece.

Compatible with pyxrt from XRT 2021.1: `kernel` with four arguments, `sync` with three, `run.set_arg` with buffers and
C ints. `run.wait` would hold the interpreter's lock, so `run.state` is polled.
"""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hillinfer.errors import DriveError
from hillinfer.systems.hillinfer.protocol import Emulation, Shape
from hillinfer.tiers.block_file import BLOCK

KERNEL = "cec_kernel"
HEADER, ALL = 64, 2  # bytes before a head's scores; the kernel mode that sends every score
STATUS = "more tokens than it holds, misaligned buffers, a bad argument, a failed read, a failed write, a query of -128"
FAILED = ("ERROR", "ABORT", "TIMEOUT", "NORESPONSE")  # states of a run; the binding has no name for "running"
NO_P2P = "P2P is off: xbutil configure --p2p enable (and Above-4G decoding in the BIOS), then a warm reboot"
NAME = re.compile(r"int(?P<bits>[48])-d(?P<head_dim>\d+)-g(?P<group>\d+)-l(?P<lanes>\d+)(-n(?P<nmax>\d+))?")


@dataclass(frozen=True)
class Xrt(Emulation):
    """Settings of a card. `rates` give the modelled time that is reported beside the measured one."""

    xclbin: Path | None = None  # its name gives the kernel's parameters, such as int8-d128-g4-l64
    bits: int = 8  # of the codes
    device: int = 0
    page_bytes: int = 8 << 20
    timeout: float = 10.0  # seconds for one run of the kernel


class Card:
    """Device, kernel and the buffers of two concurrent runs."""

    def __init__(self, settings: Xrt, shape: Shape):
        xclbin, self.xrt, self.device = check_card(settings.xclbin, settings.device)
        values = NAME.search(xclbin.name).groupdict(131_072).values()
        self.bits, self.head_dim, self.group, _, nmax = map(int, values)
        self.name, self.heads, self.timeout = xclbin.name, shape.kv_heads, settings.timeout
        if shape.head_dim > self.head_dim or settings.bits > self.bits:
            most = f"{self.name} scores INT{self.bits} codes of up to {self.head_dim} channels"
            raise DriveError(f"{most}, not INT{settings.bits} of {shape.head_dim}: link another (make -C fpga link)")
        with explained(f"the card refuses {self.name}: wrong shell? Link it for the platform in xbutil examine"):
            uuid = self.device.load_xclbin(str(xclbin))
        with explained(f"{self.name} has no {KERNEL}: link it again (make -C fpga link)"):
            self.kernel = self.xrt.kernel(self.device, uuid, KERNEL, self.xrt.kernel.shared)
        self.token_bytes = self.head_dim * self.bits // 8
        self.page = max(2, min(settings.page_bytes // (self.heads * self.token_bytes), nmax) // 2 * 2)  # tokens
        self.slot = -(-self.page * self.heads * self.token_bytes // BLOCK) * BLOCK  # bytes of a page's buffer
        self.out_stride = HEADER + -(-8 * self.page // 64) * 64
        self.queries: list[Buffer] = []  # by head of a group
        self.outs = [self.buffer(self.heads * self.out_stride, "normal", 2) for _ in range(2)]
        self.stages = [self.buffer(self.slot, "p2p", 0) for _ in range(2)]
        self.runs = [self.xrt.run(self.kernel) for _ in range(2)]

    def buffer(self, nbytes: int, kind: str, argument: int) -> "Buffer":
        """Mapped card memory for a kernel argument."""
        size = -(-nbytes // BLOCK) * BLOCK
        fix = NO_P2P if kind == "p2p" else "its memory is full: lower dram_bytes"
        with explained(f"no {kind} buffer of {size:,} bytes on the card: {fix}"):
            bo = self.xrt.bo(self.device, size, getattr(self.xrt.bo, kind), self.kernel.group_id(argument))
            buffer = np.frombuffer(bo.map(), np.uint8)[:nbytes].view(Buffer)
        buffer.bo = bo
        return buffer

    def push(self, buffer: "Buffer", start: int, end: int) -> None:
        """Copy bytes start..end, widened to whole blocks, to the device."""
        start, end = start // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, -(-len(buffer) // BLOCK) * BLOCK)
        buffer.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, end - start, start)

    def set_query(self, query: np.ndarray) -> None:
        """Set the query (Hkv, G, D) int8 of the next runs, each of which takes one head of every group."""
        heads, group, dim = query.shape
        while len(self.queries) < group:
            self.queries.append(self.buffer(heads * self.group * self.head_dim, "normal", 1))
        for number, buffer in enumerate(self.queries[:group]):
            whole = buffer.view(np.int8).reshape(heads, self.group, self.head_dim)
            whole[:] = 0
            whole[:, :, :dim] = query[:, number : number + 1]  # all of the kernel's group alike: the best is any
            self.push(buffer, 0, len(buffer))

    def start(self, slot: int, keys: "Buffer", head: int, first: int, n: int) -> None:
        """Start scoring n tokens of a page from `first` on, by this head of each group, in run `slot`, 0 or 1."""
        out, run = self.outs[slot], self.runs[slot]
        for at in range(0, self.heads * self.out_stride, self.out_stride):  # no stale header may pass for this run's
            out[at : at + 16] = 0xFF
            out.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, HEADER, at)
        scalars = (first, n, n, self.heads, ALL, self.page * self.token_bytes, self.out_stride)
        for index, argument in enumerate((keys.bo, self.queries[head].bo, out.bo, *map(int, scalars))):
            run.set_arg(index, argument)
        run.start()

    def finish(self, slot: int, n: int) -> np.ndarray:
        """Wait for a run: its scores (Hkv, n)."""
        states, until, nap = self.xrt.ert_cmd_state, time.monotonic() + self.timeout, 2e-5
        failed = [getattr(states, f"ERT_CMD_STATE_{name}", None) for name in FAILED]
        while (state := self.runs[slot].state()) != states.ERT_CMD_STATE_COMPLETED:
            if state in failed:
                raise DriveError(f"the card ended a run with {state}; see dmesg, then xbutil reset")
            if time.monotonic() > until:
                raise DriveError(f"the card gave no answer for {self.timeout:g} s; try xbutil reset")
            time.sleep(nap)
            nap = min(2 * nap, 1e-3)
        out = self.outs[slot]
        out.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE, self.heads * self.out_stride, 0)
        words = out.view(np.ndarray).view(np.int32).reshape(self.heads, -1)
        bad = words[(words[:, 2] != 0) | (words[:, 0] != n)]
        if len(bad):
            count, status = bad[0, 0], max(0, bad[0, 2])
            texts = [text for i, text in enumerate(STATUS.split(", ")) if status >> i & 1] or ["no answer written"]
            raise DriveError(f"the kernel scored {count} of {n} tokens: {' and '.join(texts)}")
        return words[:, HEADER // 4 :].reshape(self.heads, -1, 2)[:, :n, 1]


class Buffer(np.ndarray):
    """Mapped memory of the card. It keeps the buffer object alive, which the mapping alone does not."""

    bo = None


@contextlib.contextmanager
def explained(text: str):
    """Turn XRT's RuntimeError into a DriveError with this explanation."""
    try:
        yield
    except RuntimeError as error:
        raise DriveError(f"{text} ({error})") from None


def check_card(path: str | Path | None, index: int = 0) -> tuple:
    """The kernel's file, by setting or environment, pyxrt, and its device. DriveError names the missing piece."""
    vendors = [vendor.read_text(encoding="utf-8").strip() for vendor in Path("/sys/bus/pci/devices").glob("*/vendor")]
    found = f"PCI functions by Xilinx (vendor 10ee) on this machine: {vendors.count('0x10ee')}"
    try:
        import pyxrt
    except ImportError as error:
        fix = "install XRT, run `source /opt/xilinx/xrt/setup.sh`, use its Python"
        missing = f"drive_kind xrt needs XRT's Python binding pyxrt ({error}): {fix}"
        raise DriveError(f"{missing}. {found}. Without a SmartSSD use drive_kind emulated") from None
    with explained(f"XRT finds no device {index}: see xbutil examine. {found}"):
        device = pyxrt.device(index)
    if not (path := path or os.environ.get("HILLINFER_XCLBIN")):
        raise DriveError("the card needs a kernel: --xclbin FILE (make -C fpga link builds it)")
    path = Path(path)
    if not path.is_file():
        raise DriveError(f"there is no xclbin {path}: build one with make -C fpga link, name it with --xclbin FILE")
    if not NAME.search(path.name):
        raise DriveError(f"{path.name} does not name the kernel's parameters: keep the name from make -C fpga link")
    return path, pyxrt, device
