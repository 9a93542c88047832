"""Data exchanged by host and computational drive: shapes, rates, score blocks, and the work of each operation."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Streams and record sizes of a drive: streams = layers * batch, stream = layer * batch + row."""

    streams: int
    batch: int
    record_bytes: int  # one token's K and V of all KV heads
    kv_heads: int
    head_dim: int  # of the key codes; 0 for a drive that keeps none

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's key codes."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Rates:
    """Transfer rates of a drive's parts, bytes/s."""

    nand_read: float
    nand_write: float
    dram_read: float
    link: float
    kernel: float = math.inf  # codes scored by the evaluation kernel
    call: float = 0.0  # seconds of overhead to start and finish one evaluation


# Xilinx's SmartSSD samples and papers that measured the card, GB/s: NAND to FPGA 2.4 (one synchronous stream) to 3.3,
# FPGA to NAND 1.04 (synchronous) to 2.85 (overlapped), both in transfers of 1 MiB or many at once; FPGA DRAM 15.4
# (measured); PCIe 3 x4 link 3.2 (1.87 to 3.27 in the overlap samples).
SMARTSSD = Rates(nand_read=3.2e9, nand_write=2.85e9, dram_read=15.4e9, link=3.2e9)


@dataclass(frozen=True)
class Emulation:
    """Settings of an emulated drive. `rates` give the modelled time; if `paced`, operations take at least that long."""

    dram_bytes: int = 4 << 30  # for key codes, as on a SmartSSD; codes beyond it spill to the file
    page_bytes: int = 1 << 20  # of codes, the unit of reads from the file
    rates: Rates = SMARTSSD
    paced: bool = False
    threads: int = 16  # for file I/O without io_uring
    engine: str = "auto"  # of `BlockFile`
    timeout: float = 60.0  # seconds without progress after which the file counts as stuck
    checksums: bool = True  # of `BlockFile`


class ScoreBlock(NamedTuple):
    """Positions (m,) int32, ascending, and their scores (Hkv*G, m) int32: dot products of codes."""

    positions: np.ndarray
    scores: np.ndarray


@dataclass
class Work:
    """Cost of one operation. `measured_s` is the drive's busy time without pacing. `modelled_s` follows from bytes and
    `Rates` for a pipeline of the parts: each processes one block while the next part processes the previous block.
    """

    calls: int = 0
    nand_bytes: int = 0
    dram_bytes: int = 0
    link_bytes: int = 0
    measured_s: float = 0.0
    modelled_s: float = 0.0
    start_ns: int = 0  # time.perf_counter_ns; of a sum, the first start and the last end
    end_ns: int = 0

    def __add__(self, other: "Work") -> "Work":
        if not (self.calls and other.calls):
            return replace(self if self.calls else other)
        names = ("calls", "nand_bytes", "dram_bytes", "link_bytes", "measured_s", "modelled_s")
        sums = [getattr(self, name) + getattr(other, name) for name in names]
        return Work(*sums, min(self.start_ns, other.start_ns), max(self.end_ns, other.end_ns))


class Meter:
    """Counts bytes and time of one operation. `pace(until)` is called after each block with its modelled end
    (time.perf_counter); it may sleep until then or raise.
    """

    def __init__(self, rates: Rates, pace: Callable[[float], None]):
        self.rates, self.pace, self.paced_s = rates, pace, 0.0
        self.work = Work(calls=1, start_ns=time.perf_counter_ns())
        self.free = dict.fromkeys(("nand_read", "nand_write", "dram_read", "kernel", "link"), 0.0)  # seconds from start

    def move(self, **parts: int) -> None:
        """Pass one block through these parts in order, part=bytes. A part starts once it is free."""
        at = 0.0
        for part, nbytes in parts.items():
            at = self.free[part] = max(at, self.free[part]) + nbytes / getattr(self.rates, part)
            if part != "kernel":  # its bytes are those read from DRAM
                name = f"{part.split('_')[0]}_bytes"
                setattr(self.work, name, getattr(self.work, name) + nbytes)
        self.work.modelled_s = max(self.work.modelled_s, at)
        before = time.perf_counter()
        self.pace(self.work.start_ns / 1e9 + at)
        self.paced_s += time.perf_counter() - before

    def stop(self) -> Work:
        self.work.end_ns = time.perf_counter_ns()
        self.work.measured_s = (self.work.end_ns - self.work.start_ns) / 1e9 - self.paced_s
        return self.work
