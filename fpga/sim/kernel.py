"""The simulated kernel: build it, map memory, run it, read the answer."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

FPGA = Path(__file__).parents[1]
CACHE = FPGA.parent / "out" / "fpga"
INDICES, PAIRS, ALL = range(3)  # modes
CAPACITY, ALIGN, BAD_ARGUMENT, READ_ERROR, WRITE_ERROR, QUERY_RANGE = (1 << i for i in range(6))  # status
HUNG = 0xFFFFFFFF
HEADER = 64  # bytes of the header before a head's data
MACHINES = {  # state machines and their states, numbered as in the RTL
    "kernel": "IDLE CHECK START RUN DONE".split(),
    "reader": "IDLE QUERY WAIT KEYS DRAINING".split(),
    "topk": "CLEAR IDLE WALK1 REFINE WALK2 EMIT FINISH".split(),
    "writer": "IDLE SIZE DATA ADDRESS HEADER HEADER_DATA RESPONSE NEXT".split(),
}


class MissingTool(RuntimeError):
    """A tool of simulation or synthesis is not installed. The message says how to install it."""


@dataclass(frozen=True)
class Config:
    """One configuration: bytes of the memory port, bits per code, head_dim, query heads per KV head, tokens."""

    bits: int = 8
    head_dim: int = 128
    lanes: int = 64
    group: int = 4
    nmax: int = 131072

    @property
    def name(self) -> str:
        size = "" if self.nmax == 131072 else f"-n{self.nmax}"
        return f"int{self.bits}-d{self.head_dim}-g{self.group}-l{self.lanes}{size}"

    @property
    def token_bytes(self) -> int:
        return self.head_dim * self.bits // 8

    @property
    def ideal(self) -> float:
        """Cycles per token at the memory port's bandwidth."""
        return self.token_bytes / self.lanes


class Options(ctypes.Structure):
    """Memory options: see `Options` in cec_sim.cpp."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("latency", "jitter", "rate", "stall", "seed", "max_cycles")),
        ("bad_read", ctypes.c_uint64),
        ("bad_write", ctypes.c_uint64),
    ]


class Result(ctypes.Structure):
    """Result of a run: see `Result` in cec_sim.cpp."""

    _fields_ = [("status", ctypes.c_uint32), ("violations", ctypes.c_uint32)] + [
        (name, ctypes.c_uint64) for name in ("cycles", "read_bytes", "written_bytes", "read_waits", "kernel_waits")
    ]


class Answer(NamedTuple):
    """One head's answer: `positions` (m,) int64 and, except in mode INDICES, `scores` (m,) int32."""

    positions: np.ndarray
    scores: np.ndarray | None
    threshold: int
    status: int


def build(config: Config) -> Path:
    """Shared library of a simulated kernel, cached until the RTL or the harness changes."""
    sources = [*sorted((FPGA / "rtl").glob("*.v")), FPGA / "sim/cec_sim.cpp", FPGA / "sim/build.sh"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    path = CACHE / f"{config.name}-{digest}.so"
    if not path.exists():
        if not (shutil.which("verilator") and shutil.which("g++")):
            raise MissingTool("the simulation needs Verilator and a compiler: apt-get install verilator g++ make")
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"{config.name}.lock").open("w") as lock:  # another process may build the same library
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                values = map(str, (config.lanes, config.bits, config.head_dim, config.group, config.nmax))
                subprocess.run(["sh", FPGA / "sim/build.sh", path, *values], check=True)
    return path


class Memory:
    """The drive's DRAM: arrays mapped at addresses."""

    def __init__(self, kernel: "Kernel"):
        self.kernel, self.next, self.kept = kernel, 1 << 32, {}

    def place(self, array: np.ndarray, skew: int = 0) -> int:
        """Map a contiguous array and return its address, a multiple of 4 KiB plus `skew`."""
        assert array.flags.c_contiguous
        address = self.next + skew
        self.kernel.map(address, array.ctypes.data, array.nbytes)
        self.kept[address] = array
        self.next += -(-(array.nbytes + skew) // 4096) * 4096 + 4096
        return address

    def clear(self) -> None:
        for address in self.kept:
            self.kernel.unmap(address)
        self.kept.clear()


class Kernel:
    """One simulated kernel. Runs one call at a time; not thread-safe."""

    def __init__(self, config: Config):
        self.config, self.lib = config, ctypes.CDLL(os.fspath(build(config)))
        self.lib.cec_open.restype = ctypes.c_void_p
        self.lib.cec_fault.restype = ctypes.c_char_p
        self.handle = ctypes.c_void_p(self.lib.cec_open())
        self.memory(latency=60)

    def memory(self, latency=60, jitter=0, rate=None, stall=0, seed=1, max_cycles=1 << 30, bad_read=-1, bad_write=-1):
        """Set the behaviour of the memory.

        rate   bytes per cycle
        stall  probability of a stall in 1/256, for each channel
        seed   modulo 3, the order in which a write's address and data are accepted: see `offer` in cec_sim.cpp
        """
        rate = int((rate or self.config.lanes) * 256)
        mask = (1 << 64) - 1
        options = Options(latency, jitter, rate, stall, seed, max_cycles, bad_read & mask, bad_write & mask)
        self.lib.cec_options(self.handle, ctypes.byref(options))

    def map(self, address: int, pointer: int, nbytes: int) -> None:
        size = ctypes.c_uint64(nbytes)
        self.lib.cec_map(self.handle, ctypes.c_uint64(address), ctypes.c_void_p(pointer), size)

    def unmap(self, address: int) -> None:
        self.lib.cec_unmap(self.handle, ctypes.c_uint64(address))

    def run(self, keys, query, out, first, n_tokens, k, heads, mode, key_stride, out_stride) -> Result:
        """One call with these arguments, in the kernel's order."""
        words = [part for pointer in (keys, query, out) for part in (pointer & 0xFFFFFFFF, pointer >> 32)]
        words += [first, n_tokens, k, heads, mode, key_stride, out_stride]
        result = Result()
        self.lib.cec_run(self.handle, (ctypes.c_uint32 * 13)(*words), ctypes.byref(result))
        if result.violations:
            raise AssertionError(f"the kernel broke the AXI protocol: {self.lib.cec_fault(self.handle).decode()}")
        return result

    def transitions(self) -> dict[str, dict[tuple[str, str], int]]:
        """Number of transitions between the states of each state machine since the kernel's creation."""
        counts = np.zeros((4, 8, 8), np.uint32)
        self.lib.cec_visits(self.handle, counts.ctypes.data_as(ctypes.c_void_p))
        return {
            machine: {(a, b): int(counts[i, x, y]) for x, a in enumerate(names) for y, b in enumerate(names)}
            for i, (machine, names) in enumerate(MACHINES.items())
        }

    def close(self) -> None:
        if self.handle:
            self.lib.cec_close(self.handle)
            self.handle = None


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes (..., D) in the kernel's memory layout: two INT4 codes per byte, the even one in the low nibble."""
    return codes if bits == 8 else ((codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)).astype(np.int8)


@dataclass
class Image:
    """The memory of one call: codes (H, n, D) int8, query (H, G, D) int8, room for the answer."""

    config: Config
    codes: np.ndarray
    query: np.ndarray
    k: int
    mode: int = INDICES
    first: int = 0
    n: int | None = None
    keys: np.ndarray = field(init=False)
    out: np.ndarray = field(init=False)

    def __post_init__(self):
        heads, tokens, _ = self.codes.shape
        self.n = tokens - self.first if self.n is None else self.n
        packed = pack(self.codes, self.config.bits)
        self.key_stride = -(-max(1, tokens * self.config.token_bytes) // 4096) * 4096
        self.keys = np.zeros((heads, self.key_stride), np.int8)
        self.keys[:, : packed[0].size] = packed.reshape(heads, -1)
        self.query = np.ascontiguousarray(self.query)
        entry, count = (4, min(self.k, self.n)) if self.mode == INDICES else (8, min(self.k, self.n))
        count = self.n if self.mode == ALL else count
        self.out_stride = HEADER + -(-entry * count // 64) * 64
        self.out = np.full(heads * self.out_stride + 64, 0xEE, np.uint8)  # what follows must stay as it is

    def arguments(self, memory: Memory, skew: int = 0) -> tuple:
        """Arguments in the kernel's order; `skew` shifts every pointer."""
        places = (memory.place(part, skew) for part in (self.keys, self.query, self.out))
        return (*places, self.first, self.n, self.k, len(self.codes), self.mode, self.key_stride, self.out_stride)

    def answers(self) -> list[Answer]:
        assert (self.out[-64:] == 0xEE).all(), "written beyond the answer"
        return [
            parse(self.out[head * self.out_stride : (head + 1) * self.out_stride], self.mode)
            for head in range(len(self.codes))
        ]


def parse(region: np.ndarray, mode: int) -> Answer:
    """Parse a head's output region into its answer."""
    words = region[: len(region) // 4 * 4].view(np.int32)
    count, threshold, status, _ = (int(word) for word in words[:4])
    data = words[HEADER // 4 :]
    if mode == INDICES:
        return Answer(data[:count].astype(np.int64), None, threshold, status)
    both = data[: 2 * count].reshape(-1, 2)
    return Answer(both[:, 0].astype(np.int64), both[:, 1].copy(), threshold, status)


def call(kernel: Kernel, image: Image, skew: int = 0) -> tuple[Result, list[Answer]]:
    """Run one image."""
    memory = Memory(kernel)
    try:
        return kernel.run(*image.arguments(memory, skew)), image.answers()
    finally:
        memory.clear()
