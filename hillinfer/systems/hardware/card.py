"""A SmartSSD's FPGA through the Xilinx Runtime: device, kernel, mapped buffers, runs. Errors name the missing piece.

Compatible with pyxrt from XRT 2021.1: `kernel` with four arguments, `sync` with three, `run.set_arg` with buffers and
C ints. `run.wait` would hold the interpreter's lock, so `run.state` is polled.
"""

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
                f"the card refuses {xclbin.name} ({error}): wrong shell? Link it for the platform that xbutil examine "
                "reports"
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
        """Mapped card memory for a kernel argument."""
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
        """Copy bytes start..end, widened to whole blocks, to the device."""
        start, end = start // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, -(-len(buffer) // BLOCK) * BLOCK)
        buffer.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, end - start, start)

    def set_query(self, query: np.ndarray) -> None:
        """Set the query (Hkv, G, D) int8 of the next runs. A group smaller than the kernel's repeats its first head."""
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
        """Start scoring n tokens of a page from `first` on, in run `slot`, 0 or 1."""
        out, run = self.outs[slot], self.runs[slot]
        for head in range(self.heads):  # so that no stale header passes for this run's
            at = head * self.out_stride
            out[at : at + 16] = 0xFF
            out.bo.sync(self.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, HEADER, at)
        scalars = (first, n, n, self.heads, ALL, self.page * self.token_bytes, self.out_stride)
        for index, argument in enumerate((keys.bo, self.query.bo, out.bo, *map(int, scalars))):
            run.set_arg(index, argument)
        run.start()

    def finish(self, slot: int, n: int) -> np.ndarray:
        """Wait for a run: its scores (Hkv, n)."""
        states, until, nap = self.xrt.ert_cmd_state, time.monotonic() + self.settings.timeout, 2e-5
        failed = [getattr(states, f"ERT_CMD_STATE_{name}", None) for name in FAILED]
        while (state := self.runs[slot].state()) != states.ERT_CMD_STATE_COMPLETED:
            if state in failed:
                raise DriveError(f"the card ended a run with {state}; see dmesg, then xbutil reset")
            if time.monotonic() > until:
                raise DriveError(f"the card gave no answer for {self.settings.timeout:g} s; try xbutil reset")
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
    """Mapped memory of the card. It keeps the buffer object alive, which the mapping alone does not."""

    bo = None


def open_device(index: int = 0) -> tuple:
    """pyxrt and one of its devices. DriveError lists everything missing."""
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
    """The kernel's file, by setting or environment, after checks of card, binding, file and name (DriveError)."""
    open_device(device)
    path = path or os.environ.get("HILLINFER_XCLBIN")
    if not path:
        raise DriveError("the card needs a kernel: --xclbin FILE (make -C fpga link builds it)")
    path = Path(path)
    if not path.is_file():
        raise DriveError(f"there is no xclbin {path}: build one with make -C fpga link, name it with --xclbin FILE")
    if not NAME.search(path.name):
        raise DriveError(f"{path.name} does not name the kernel's parameters: keep the name from make -C fpga link")
    return path


def find_card() -> str:
    """One phrase on the Xilinx devices of the PCI bus."""
    vendors = [vendor.read_text().strip() for vendor in Path("/sys/bus/pci/devices").glob("*/vendor")]
    cards = vendors.count("0x10ee")
    return (
        f"{cards} PCI functions of Xilinx are here" if cards else "There is no PCI device of Xilinx (vendor 10ee) here"
    )
