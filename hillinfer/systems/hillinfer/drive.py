"""A drive that scores keys where they lie (HillInfer HIE and CEC): its protocol, rates, and the memory of its codes.

The host scores its hot pool, the drive its cold one, at the same time. The drive sends score blocks
`<positions, scores>` which the host merges while the next block is scored; records of the winners are fetched after.
`EmulatedDrive` implements the protocol in a process, `XrtDrive` on a SmartSSD through its runtime. numpy only.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from hillinfer import native
from hillinfer.errors import DriveError
from hillinfer.tiers.block_file import BLOCK, aligned
from hillinfer.tiers.record_file import RecordFile

EXACT_DIM = 2**24 // 127**2  # 1,040: up to this head_dim an fp32 sum of code products is an exact integer in any order


@dataclass(frozen=True)
class Shape:
    """What a drive holds: streams = layers * batch, stream = layer * batch + row."""

    streams: int
    batch: int
    record_bytes: int  # one token's K and V of all KV heads
    kv_heads: int
    head_dim: int  # of the key codes; 0 if it is to keep none

    def __post_init__(self):
        if self.head_dim > EXACT_DIM:
            raise ValueError(f"head_dim {self.head_dim} is above {EXACT_DIM}, where integer scores stop being exact")

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's key codes."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Rates:
    """What the parts of a drive transfer, bytes/s."""

    nand_read: float
    nand_write: float
    dram_read: float
    link: float
    kernel: float = math.inf  # codes that the evaluation kernel scores
    call: float = 0.0  # seconds that starting and ending one evaluation takes in the kernel


# Xilinx's SmartSSD samples and papers that measured the card, GB/s: NAND to FPGA 2.4 (one synchronous stream) to 3.3,
# FPGA to NAND 1.04 (synchronous) to 2.85 (overlapped), both in transfers of 1 MiB or many at once; FPGA DRAM 15.4
# (measured); PCIe 3 x4 link 3.2 (1.87 to 3.27 in the overlap samples).
SMARTSSD = Rates(nand_read=3.2e9, nand_write=2.85e9, dram_read=15.4e9, link=3.2e9)
SMARTSSD_PESSIMISTIC = replace(SMARTSSD, nand_read=2.4e9, nand_write=1.04e9)


class ScoreBlock(NamedTuple):
    """Positions (m,) int32, ascending, and their scores (Hkv, m) int32: the group's best dot product of codes."""

    positions: np.ndarray
    scores: np.ndarray


@dataclass
class Work:
    """What one operation took. `measured_s` is busy time on the drive, without the waiting that paces it;
    `modelled_s` is what `Rates` give for its bytes, each part working on one block while the next part has the last.
    """

    calls: int = 0
    nand_bytes: int = 0
    dram_bytes: int = 0
    link_bytes: int = 0
    measured_s: float = 0.0
    modelled_s: float = 0.0
    start_ns: int = 0  # time.perf_counter_ns of this machine; of a sum, the first start and the last end
    end_ns: int = 0

    def __add__(self, other: "Work") -> "Work":
        if not (self.calls and other.calls):
            return replace(self if self.calls else other)
        names = ("calls", "nand_bytes", "dram_bytes", "link_bytes", "measured_s", "modelled_s")
        sums = [getattr(self, name) + getattr(other, name) for name in names]
        return Work(*sums, min(self.start_ns, other.start_ns), max(self.end_ns, other.end_ns))


class Meter:
    """Bytes and time of one operation. `brake(until)` waits for a time.perf_counter, to pace it."""

    def __init__(self, rates: Rates, brake: Callable[[float], None] | None = None):
        self.rates, self.brake, self.braked = rates, brake, 0.0
        self.work = Work(calls=1, start_ns=time.perf_counter_ns())
        self.free = dict.fromkeys(("nand_read", "nand_write", "dram_read", "kernel", "link"), 0.0)

    def move(self, **parts: int) -> None:
        """One block passes these parts in this order, part=bytes; a part can take it once it is done with the last."""
        at = 0.0
        for part, nbytes in parts.items():
            at = self.free[part] = max(at, self.free[part]) + nbytes / getattr(self.rates, part)
            if part != "kernel":  # it works on what the DRAM gave
                name = f"{part.split('_')[0]}_bytes"
                setattr(self.work, name, getattr(self.work, name) + nbytes)
        self._until(at)

    def wait(self, part: str, seconds: float) -> None:
        """This part is taken for so long before its first block."""
        self.free[part] += seconds
        self._until(self.free[part])

    def _until(self, at: float) -> None:
        self.work.modelled_s = max(self.work.modelled_s, at)
        if self.brake:
            before = time.perf_counter()
            self.brake(self.work.start_ns / 1e9 + at)
            self.braked += time.perf_counter() - before

    def stop(self) -> Work:
        self.work.end_ns = time.perf_counter_ns()
        self.work.measured_s = (self.work.end_ns - self.work.start_ns) / 1e9 - self.braked
        return self.work


class Evaluation(Protocol):
    """An evaluation under way: iterate over its score blocks, now or later."""

    work: Work | None  # known once the last block has arrived

    def __iter__(self) -> Iterator[ScoreBlock]: ...
    def __next__(self) -> ScoreBlock: ...


class Fetch(Protocol):
    """A fetch under way."""

    work: Work | None  # known once `result` has returned

    def result(self) -> np.ndarray:
        """Waits for the records (k, record_bytes) uint8."""


class ComputationalDrive(Protocol):
    """Commands run in the order they are given. Those without a result return at once; if one fails, the next call
    raises DriveError, and so does every call after it. Arguments that cannot be right are a ValueError at once.
    """

    shape: Shape

    def write(self, stream: int, start: int, records: np.ndarray, codes: np.ndarray) -> None:
        """Append tokens start.. (start is the stream's length): records (n, record_bytes) uint8, key codes (Hkv, n, D)
        int8. New tokens are hot until `hold` says otherwise, because the host pins the newest.
        """

    def rescale(self, stream: int, doublings: np.ndarray) -> None:
        """Channels whose scale doubled `doublings` (Hkv, D) uint8 times: codes become rint(codes / 2**doublings), as
        `KeyCodes.append` does to its own.
        """

    def hold(self, stream: int, positions: np.ndarray, hot: bool) -> None:
        """The host's pool holds these tokens now (hot: the drive does not score them), or no longer does."""

    def begin_evaluate(self, stream: int, query: np.ndarray, block: int = 1024) -> Evaluation:
        """Start scoring the stream's cold tokens, `block` at a time in ascending order, and return at once.

        query (Hkv, G, D) int8 has the scales folded in (`KeyCodes.query`). Scores equal `group_scores_reference` to the
        bit; there is no softmax and no scaling (CEC). Later calls of `hold` and `write` do not change the result.
        """

    def evaluate(self, stream: int, query: np.ndarray, block: int = 1024) -> Iterator[ScoreBlock]: ...

    def begin_attend(self, stream: int, query: np.ndarray, runs: np.ndarray, dtype: str) -> Fetch:
        """Start attending to the tokens in runs (r, 2) of [start, end), with a scaled query (Hkv, G, D) float32, over
        records of this dtype (float32, float16 or bfloat16). The result is the output (Hkv, G, D) and the logarithm of
        the sum of exponentials (Hkv, G, 1), both float32.
        """

    def begin_fetch(self, stream: int, positions: np.ndarray) -> Fetch:
        """Start reading the records of sorted positions (k,), hot or cold."""

    def fetch(self, stream: int, positions: np.ndarray) -> np.ndarray:
        """Records of sorted positions (k,): (k, record_bytes) uint8."""

    def truncate(self, stream: int, n: int) -> None:
        """Forget all tokens from n on."""

    def report(self) -> dict[str, Work]:
        """All work so far by kind: write, rescale, evaluate, fetch. Waits for what is under way."""

    def close(self) -> None: ...


class CodeMemory:
    """Key codes of all streams in pages of tokens (Hkv, page, D) int8. A stream's last, growing page is in memory; full
    pages are, too, while `dram_bytes` lasts, and later ones go to the drive's file.
    """

    def __init__(self, file: RecordFile, shape: Shape, dram_bytes: int, page_bytes: int = 1 << 20):
        self.file, self.shape = file, shape
        self.page = max(1, page_bytes // max(1, shape.code_bytes))  # tokens; 1 MiB is where the NAND reaches its rate
        self.slot = max(BLOCK, -(-self.page * shape.code_bytes // BLOCK) * BLOCK)
        self.room = dram_bytes // self.slot - shape.streams  # full pages that may still stay in memory
        if self.room < 0:
            raise DriveError(
                f"the newest codes of {shape.streams} streams need {shape.streams * self.slot:,} bytes "
                f"of drive memory, but it has {dram_bytes:,}: raise dram_bytes"
            )
        self.pages: list[list[np.ndarray | int]] = [[] for _ in range(shape.streams)]  # in memory, or the file offset
        self.lengths = [0] * shape.streams
        self.free: list[int] = []  # file offsets of pages no longer needed
        self.cached: tuple[int, np.ndarray] | None = None  # the page last read from the file: blocks may share it

    def allocate(self) -> np.ndarray:
        """Memory for a page."""
        return aligned(self.slot)

    def rescaled(self, codes: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """A page's codes (Hkv, page, D), divided by factor (Hkv, 1, D)."""
        return np.rint(codes / factor)

    def append(self, stream: int, codes: np.ndarray) -> int:
        """Add codes (Hkv, n, D). Returns the bytes written to the file."""
        pages, done, spilled = self.pages[stream], 0, 0
        while done < codes.shape[1]:
            at = self.lengths[stream] % self.page
            if at == 0:
                pages.append(self.allocate())
            part = codes[:, done : done + self.page - at]
            self._codes(pages[-1])[:, at : at + part.shape[1]] = part
            done += part.shape[1]
            self.lengths[stream] += part.shape[1]
            if self.lengths[stream] % self.page == 0:
                self.room -= 1
                if self.room < 0:
                    self.room = 0
                    buffer, pages[-1] = pages[-1], self.free.pop() if self.free else self.file.allocate(self.slot)
                    self._store(stream, len(pages) - 1, buffer)
                    spilled += self.slot
        return spilled

    def rescale(self, stream: int, doublings: np.ndarray) -> int:
        """See `ComputationalDrive.rescale`. Returns the bytes read from the file, and as many written."""
        factor, moved = np.float32(2) ** doublings[:, None], 0
        for index, page in enumerate(self.pages[stream]):
            buffer = self._load(stream, index)[0]
            codes = self._codes(buffer)
            codes[:] = self.rescaled(codes, factor)
            if isinstance(page, int):
                self._store(stream, index, buffer)
                moved += self.slot
        return moved

    def scores(self, stream: int, query: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, int]:
        """query (Hkv, G, D) int8, sorted positions (m,) -> scores (Hkv, m) int32, max over G, and the bytes read
        from the file.
        """
        out, nbytes = np.empty((self.shape.kv_heads, len(positions)), np.int32), 0
        for index in range(positions[0] // self.page, positions[-1] // self.page + 1):
            first, last = np.searchsorted(positions, (index * self.page, (index + 1) * self.page))
            if first == last:
                continue
            rows = positions[first:last] - index * self.page
            buffer, read = self._load(stream, index)
            nbytes += read
            codes = self._codes(buffer)
            if native.available():
                out[:, first:last] = native.score(query, codes, 8, rows)
                continue
            dense = rows[-1] - rows[0] + 1 == len(rows)
            codes = codes[:, rows[0] : rows[-1] + 1] if dense else codes.take(rows, 1)
            out[:, first:last] = np.matmul(query.astype(np.float32), codes.astype(np.float32).transpose(0, 2, 1)).max(1)
        return out, nbytes

    def truncate(self, stream: int, n: int) -> None:
        """Forget all tokens from n on; n is at most the stream's length."""
        pages, full, kept = self.pages[stream], self.lengths[stream] // self.page, -(-n // self.page)
        growing = self._load(stream, kept - 1)[0] if n % self.page else None
        for page in pages[n // self.page : full]:  # full pages that go, or grow again
            if isinstance(page, int):
                self.free.append(page)
            else:
                self.room += 1
        if growing is not None:
            pages[kept - 1] = growing
        del pages[kept:]
        self.lengths[stream] = n

    def _codes(self, buffer: np.ndarray) -> np.ndarray:
        """A page's buffer as codes (Hkv, page, D) int8."""
        shape = (self.shape.kv_heads, self.page, self.shape.head_dim)
        return buffer[: self.page * self.shape.code_bytes].view(np.int8).reshape(shape)

    def _load(self, stream: int, index: int) -> tuple[np.ndarray, int]:
        """A page's buffer, and the bytes read from the file for it."""
        page = self.pages[stream][index]
        if not isinstance(page, int):
            return page, 0
        if self.cached is not None and self.cached[0] == page:
            return self.cached[1], 0
        buffer = self.allocate()
        self.file.transfer("read", [(page, buffer)], stream, index * self.page)
        self.cached = page, buffer
        return buffer, self.slot

    def _store(self, stream: int, index: int, buffer: np.ndarray) -> None:
        self.file.transfer("write", [(self.pages[stream][index], buffer)], stream, index * self.page)
        self.cached = None
