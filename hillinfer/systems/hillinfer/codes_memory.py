"""Key codes in a drive's memory, with spilling to its file, and their scores."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hillinfer import native
from hillinfer.errors import DriveError
from hillinfer.evaluator.codes import head_scores_reference
from hillinfer.growable import aligned
from hillinfer.systems.hillinfer.protocol import Shape
from hillinfer.tiers.block_file import BLOCK
from hillinfer.tiers.record_file import RecordFile


class Scored(NamedTuple):
    """Scores (Hkv*G, m) int32, the bytes read from the file for them, and the bytes of codes read from memory."""

    scores: np.ndarray
    read: int
    codes: int


class CodeMemory:
    """Key codes of all streams in pages of tokens (Hkv, page, D) int8. A stream's last page, which grows, is always
    in memory; full pages spill to the drive's file once `dram_bytes` is used up.
    """

    def __init__(self, file: RecordFile, shape: Shape, dram_bytes: int, page_bytes: int = 1 << 20):
        self.file, self.shape = file, shape
        self.page = max(1, page_bytes // max(1, shape.code_bytes))  # tokens; NAND reaches its full rate at 1 MiB
        self.slot = max(BLOCK, -(-self.page * shape.code_bytes // BLOCK) * BLOCK)
        self.room = dram_bytes // self.slot - shape.streams  # full pages that still fit in memory
        if self.room < 0:
            need = f"{shape.streams} streams need {shape.streams * self.slot:,} bytes of drive memory for new codes"
            raise DriveError(f"{need}, but it has {dram_bytes:,}: raise dram_bytes")
        self.pages: list[list[np.ndarray | int]] = [[] for _ in range(shape.streams)]  # in memory, or the file offset
        self.lengths = [0] * shape.streams
        self.free: list[int] = []  # file offsets of discarded pages

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
            buffer, nbytes = self._load(stream, index)
            codes = self._codes(buffer)
            codes[:] = self.rescaled(codes, factor)
            if isinstance(page, int):
                self._store(stream, index, buffer)
            moved += nbytes
        return moved

    def scores(self, stream: int, query: np.ndarray, positions: np.ndarray, block: int) -> Iterator[Scored]:
        """Score sorted positions (m,) with query (Hkv, G, D) int8, in parts of one page and at most `block` tokens."""
        for index, rows in self.by_page(stream, positions):
            buffer, read = self._load(stream, index)
            for at in range(0, len(rows), block):
                part = rows[at : at + block]
                yield Scored(_scores(query, self._codes(buffer), part), read, len(part) * self.shape.code_bytes)
                read = 0

    def by_page(self, stream: int, positions: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Sorted positions as (page, rows in the page), without empty pages."""
        cuts = np.searchsorted(positions, np.arange(len(self.pages[stream]) + 1) * self.page)
        return [(i, positions[a:b] - i * self.page) for i, (a, b) in enumerate(pairwise(cuts)) if a < b]

    def truncate(self, stream: int, n: int) -> None:
        """Discard all tokens from n on; n is at most the stream's length."""
        pages, full, kept = self.pages[stream], self.lengths[stream] // self.page, -(-n // self.page)
        growing = self._load(stream, kept - 1)[0] if n % self.page else None
        for page in pages[n // self.page : full]:  # full pages that are discarded or become partial
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
        buffer = self.allocate()
        self.file.transfer("read", [(page, buffer)], stream, index * self.page)
        return buffer, self.slot

    def _store(self, stream: int, index: int, buffer: np.ndarray) -> None:
        self.file.transfer("write", [(self.pages[stream][index], buffer)], stream, index * self.page)


def _scores(query: np.ndarray, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Scores (Hkv*G, m) int32 of these rows of a page, on one thread: the others belong to the model."""
    if native.available():
        return native.score(query, codes, 8, rows)
    return head_scores_reference(query, codes[:, rows])
