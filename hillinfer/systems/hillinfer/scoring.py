"""A layer's KV on a computational drive: the host scores its hot pool, the drive its cold one (HillInfer HIE)."""

import time
from collections.abc import Callable

import numpy as np
import torch

from hillinfer.systems.hillinfer.drive import ComputationalDrive
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.records import Records
from hillinfer.tiers.tiered_store import TieredStore


class DriveLog:
    """One sequence's records on a computational drive, which writes behind; same interface as `RecordLog`."""

    nbytes = 0

    def __init__(self, drive: ComputationalDrive, geometry: Geometry, stream: int):
        self.drive, self.geometry, self.stream, self.n = drive, geometry, stream, 0

    def append(self, records: torch.Tensor, codes: tuple[torch.Tensor, torch.Tensor] | None) -> int:
        """Add records (n, 2, Hkv, D), with their key codes int8 (Hkv, n, D) and the scales' doublings uint8 (Hkv, D);
        None for a drive without codes.
        """
        new = np.empty((self.geometry.kv_heads, len(records), 0), np.int8)
        if codes is not None:
            new, doublings = (part.contiguous().numpy() for part in codes)
            if self.n and doublings.any():
                self.drive.rescale(self.stream, doublings)
        data = self.geometry.as_bytes(records)
        self.drive.write(self.stream, self.n, data, new)
        self.n += len(records)
        return data.nbytes

    def read(self, positions: np.ndarray, exact: bool = True) -> tuple[Records, int]:
        """Records of sorted positions (k,), and the bytes that the drive read."""
        out = self.geometry.empty(len(positions))
        if not len(positions):
            return Records(out), 0
        fetch = self.drive.begin_fetch(self.stream, positions)
        self.geometry.as_bytes(out)[:] = fetch.result()
        return Records(out), fetch.work.nand_bytes

    def truncate(self, n: int) -> None:
        self.drive.truncate(self.stream, n)
        self.n = n


class ScoringStore(TieredStore):
    """A `TieredStore` whose drive scores the tokens outside the hot pool."""

    scores_keys = True
    block = 1024  # tokens of one score block; the paper leaves it open

    def __init__(self, *args):
        super().__init__(*args)
        self.hot = [np.zeros(0, bool) for _ in self.logs]  # tokens that the host scores, as the drive knows them

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.hot = [hot[:n] for hot in self.hot]

    def scores(self, row: int, query: torch.Tensor, score: Callable, scanned: int) -> np.ndarray:
        """See `Store.scores`; equal to the bit to the host's own scores of all keys."""
        log = self.logs[row]
        self._announce(row)
        blocks = log.drive.begin_evaluate(log.stream, query.numpy(), self.block)
        start, hot = time.perf_counter_ns(), np.flatnonzero(self.hot[row])
        out = np.empty((query.shape[0] * query.shape[1], len(self.hot[row])), np.int32)
        out[:, hot] = score(hot)
        scored = self.track.add("cpu", "score", start, query.shape[0] * query.shape[2] * len(hot))
        sent = 0
        for positions, scores in blocks:
            out[:, positions] = scores
            sent += positions.nbytes + scores.nbytes
        merged, work = time.perf_counter_ns(), blocks.work
        self.track.add("drive", "evaluate", work.start_ns, work.nand_bytes + work.dram_bytes, work.end_ns)
        self.track.add("cpu", "merge", scored, sent, merged)
        return out

    def _announce(self, row: int) -> None:
        """Send the drive the changes of a sequence's hot set."""
        log = self.logs[row]
        before, now = np.ones(log.n, bool), self.pools[row].slots(np.arange(log.n)) >= 0
        before[: len(self.hot[row])] = self.hot[row]  # new tokens are hot to the drive
        for changed, hot in ((now & ~before, True), (before & ~now, False)):
            if changed.any():
                log.drive.hold(log.stream, np.flatnonzero(changed), hot)
        self.hot[row] = now
