"""A layer's KV on a computational drive: the host scores its hot pool, the drive its cold one (HillInfer HIE)."""

import time
from collections.abc import Callable

import numpy as np
import torch

from hillinfer.systems.hillinfer.drive import ComputationalDrive
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.store import DriveStore


class RemoteStream:
    """One stream of a computational drive, with the face of `Stream`. The drive itself writes behind."""

    nbytes = 0

    def __init__(self, drive: ComputationalDrive, geometry: Geometry, index: int):
        self.drive, self.geometry, self.index, self.n = drive, geometry, index, 0

    def append(self, records: torch.Tensor, coded: tuple[torch.Tensor, torch.Tensor] | None) -> int:
        """Records (n, 2, Hkv, D) with their codes int8 (Hkv, n, D), and the doublings uint8 (Hkv, D) of older codes; or
        without, for a drive that keeps none.
        """
        none = torch.empty((self.geometry.kv_heads, len(records), 0), dtype=torch.int8), torch.zeros(0)
        codes, doublings = coded or none
        if self.n and doublings.any():
            self.drive.rescale(self.index, doublings.numpy())
        data = self.geometry.as_bytes(records)
        self.drive.write(self.index, self.n, data, codes.contiguous().numpy())
        self.n += len(records)
        return data.nbytes

    def read(self, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        out = self.geometry.empty(len(positions))
        if not len(positions):
            return out, 0
        fetch = self.drive.begin_fetch(self.index, positions)
        self.geometry.as_bytes(out)[:] = fetch.result()
        return out, fetch.work.nand_bytes

    def lend(self, positions: np.ndarray) -> tuple[torch.Tensor, None, int]:
        records, nbytes = self.read(positions)
        return records, None, nbytes

    def truncate(self, n: int) -> None:
        self.drive.truncate(self.index, n)
        self.n = n


class ScoringStore(DriveStore):
    """A `DriveStore` whose drive scores what the hot pool does not hold."""

    block = 1024  # tokens of one score block; the paper leaves it open

    def __init__(self, *args):
        super().__init__(*args)
        self.told = [np.zeros(0, bool) for _ in self.streams]  # what the drive takes for hot

    def append(self, kv: torch.Tensor, coded=None) -> list:
        work = super().append(kv, coded)
        self._tell()
        return work

    def settle(self) -> int:
        swapped = super().settle()
        if swapped:
            self._tell()
        return swapped

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.told = [told[:n] for told in self.told]
        self._tell()

    def scores(self, row: int, query: torch.Tensor, own: Callable) -> tuple[np.ndarray, list]:
        """Scores of all tokens (Hkv, n) int32, equal to the bit to the host's own, and the work done.

        query int8 (Hkv, G, D); own(positions) are the host's scores of its pool, (Hkv, m) int32.
        """
        blocks = self.streams[row].drive.begin_evaluate(self.streams[row].index, query.numpy(), self.block)
        start = time.perf_counter_ns()
        hot = np.flatnonzero(self.told[row])
        out = np.empty((query.shape[0], len(self.told[row])), np.int32)
        out[:, hot] = own(hot)
        scored = time.perf_counter_ns()
        sent = 0
        for positions, scores in blocks:
            out[:, positions] = scores
            sent += positions.nbytes + scores.nbytes
        merged, work = time.perf_counter_ns(), blocks.work
        return out, [
            ("cpu", "score", start, scored, query.shape[0] * query.shape[2] * len(hot)),
            ("drive", "evaluate", work.start_ns, work.end_ns, work.nand_bytes + work.dram_bytes),
            ("cpu", "merge", scored, merged, sent),
        ]

    def _tell(self) -> None:
        """Let the drive know which tokens came to the pool and which left it."""
        for row, (pool, stream) in enumerate(zip(self.pools, self.streams, strict=True)):
            before = np.ones(stream.n, bool)  # new tokens are hot to the drive
            before[: len(self.told[row])] = self.told[row]
            now = pool.slots(np.arange(stream.n)) >= 0
            for changed, hot in ((now & ~before, True), (before & ~now, False)):
                if changed.any():
                    stream.drive.hold(stream.index, np.flatnonzero(changed), hot)
            self.told[row] = now
