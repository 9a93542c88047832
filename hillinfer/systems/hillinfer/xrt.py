"""A SmartSSD as a computational drive: the kernel fpga/rtl/cec_kernel.v scores.

Key codes are pages in the FPGA's DRAM. Pages beyond its capacity are read from the card's flash straight into a mapped
FPGA buffer (P2P), 1 MiB at a time. Two runs overlap: while the kernel scores one page, the next is read and the
previous scores are collected. Records are in a file on the card's flash.

Untested on hardware: it has run only on a simulated kernel (tests/fake_pyxrt.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hillinfer.evaluator.codes import pack, unpack
from hillinfer.systems.hillinfer.card import Buffer, Card, Xrt
from hillinfer.systems.hillinfer.codes_memory import CodeMemory, Scored
from hillinfer.systems.hillinfer.drive import ComputationalDrive
from hillinfer.systems.hillinfer.protocol import Shape
from hillinfer.tiers.block_file import pieces
from hillinfer.tiers.record_file import RecordFile


class CardMemory(CodeMemory):
    """Codes in the kernel's format: channels padded to its head_dim, INT4 packed two to a byte."""

    def __init__(self, file: RecordFile, shape: Shape, settings: Xrt, card: Card):
        self.card, self.head_dim = card, shape.head_dim
        stored, reserved = replace(shape, head_dim=card.token_bytes), 3 * card.slot  # for stages and scores
        super().__init__(file, stored, settings.dram_bytes - reserved, card.page * stored.code_bytes)

    def allocate(self) -> Buffer:
        return self.card.buffer(self.slot, "normal", 0)

    def append(self, stream: int, codes: np.ndarray) -> int:
        before = self.lengths[stream]
        spilled = super().append(stream, self._pack(codes))
        self._push(stream, before)
        return spilled

    def rescale(self, stream: int, doublings: np.ndarray) -> int:
        moved = super().rescale(stream, doublings)
        self._push(stream, 0)
        return moved

    def rescaled(self, codes: np.ndarray, factor: np.ndarray) -> np.ndarray:
        codes = unpack(torch.from_numpy(codes), self.card.bits).numpy()[..., : self.head_dim]
        return self._pack(np.rint(codes / factor).astype(np.int8))

    def truncate(self, stream: int, n: int) -> None:
        super().truncate(stream, n)
        self._push(stream, n // self.page * self.page)  # the last page may have been loaded from the drive

    def scores(self, stream: int, query: np.ndarray, positions: np.ndarray, block: int) -> Iterator[Scored]:
        """See `CodeMemory.scores`; each part is a page.

        The kernel sends the best score of a group, so that it runs once for each head of the group.
        """
        self.card.set_query(query)
        group, running, done = query.shape[1], None, []
        for number, (index, rows) in enumerate(self.by_page(stream, positions)):
            first = int(rows[0]) // 2 * 2  # even, because two INT4 tokens may share a beat
            n = int(rows[-1]) + 1 - first
            keys, read = self._keys(number % 2, stream, index)
            for head in range(group):
                slot = (number * group + head) % 2
                self.card.start(slot, keys, head, first, n)
                if running:
                    done.append(self._finish(*running))
                running = slot, rows - first, n, 0 if head else read
                if len(done) == group:
                    yield _by_head(done)
                    done = []
        if running:
            yield _by_head([*done, self._finish(*running)])

    def _keys(self, stage: int, stream: int, index: int) -> tuple[Buffer, int]:
        """A page's codes on the card, and the bytes read from the drive for them."""
        page = self.pages[stream][index]
        if not isinstance(page, int):
            return page, 0
        buffer = self.card.stages[stage]
        self.file.transfer("read", pieces(page, buffer), stream, index * self.page, verify=False)  # stays on the card
        return buffer, self.slot

    def _finish(self, slot: int, rows: np.ndarray, n: int, read: int) -> Scored:
        return Scored(self.card.finish(slot, n)[:, rows], read, n * self.shape.code_bytes)

    def _push(self, stream: int, start: int) -> None:
        """Copy the codes of all tokens from `start` on to the device, for pages in its memory."""
        width = self.card.token_bytes
        for index in range(start // self.page, len(self.pages[stream])):
            page, base = self.pages[stream][index], index * self.page
            low, high = max(0, start - base), min(self.page, self.lengths[stream] - base)
            if isinstance(page, int) or low == high:
                continue
            for head in range(self.shape.kv_heads):
                at = head * self.page * width
                self.card.push(page, at + low * width, at + high * width)

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        wide = np.pad(codes, ((0, 0), (0, 0), (0, self.card.head_dim - codes.shape[2])))
        return pack(torch.from_numpy(wide), self.card.bits).numpy()


def _by_head(parts: list[Scored]) -> Scored:
    """Scores (Hkv*G, m) of runs of one head of each group, (Hkv, m) each."""
    scores = np.stack([part.scores for part in parts], 1).reshape(-1, parts[0].scores.shape[1])
    return Scored(scores, sum(part.read for part in parts), sum(part.codes for part in parts))


class XrtDrive(ComputationalDrive):
    """A SmartSSD; `folder` is on its own flash. DriveError names the missing piece: pyxrt, xclbin, card, shell, P2P."""

    def __init__(self, folder: Path, shape: Shape, settings: Xrt):
        card = Card(settings, shape)
        super().__init__(folder, shape, settings, lambda file: CardMemory(file, shape, settings, card))
