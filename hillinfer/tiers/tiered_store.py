"""A store over three tiers: a window on the model's device, a hot pool in host memory, every record on the drive."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

import numpy as np
import torch

from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import SharedHits
from hillinfer.tiers.log import RecordLog
from hillinfer.tiers.pool import ABSENT, DEMOTED, HotPool
from hillinfer.tiers.records import Records, Selection
from hillinfer.tiers.store import Store
from hillinfer.tiers.window import Window
from hillinfer.timeline import Served, Track

READ = 8 << 20  # bytes read at once where all are needed, while those before them are attended to


class TieredStore(Store):
    """Device window, hot pool in host memory, and every record on the drive.

    logs      one for each sequence of the batch
    pinned    fraction of the tokens, the newest, that never leaves the pool (HKM rule 1: alpha)
    capacity  pool size in tokens for each sequence, at n cached tokens
    reader    runs prefetches
    stores    those of all layers, by number: reading all of one goes on with the next
    """

    can_prefetch = True

    def __init__(
        self,
        geometry: Geometry,
        track: Track,
        logs: list[RecordLog],
        hits: SharedHits,
        window: Window,
        pinned: float,
        capacity: Callable[[int], int],
        reader: Executor,
        stores: "dict[int, TieredStore]",
    ):
        self.geometry, self.track, self.logs, self.reader, self.stores = geometry, track, logs, reader, stores
        self.hits, self.window, self.pinned, self.capacity = hits, window, pinned, capacity
        self.pools = [HotPool(geometry, row, hits) for row in range(geometry.batch)]
        # Prefetches for reading all, and for a step, by sequence: sorted positions (k,), the future of their Records
        self.ahead: tuple[dict[int, tuple[np.ndarray, Future]], ...] = {}, {}
        self.missed: list[tuple[int, np.ndarray, Selection]] = []  # read from the drive in this step

    @property
    def n(self) -> int:
        return self.window.n

    def append(self, kv: torch.Tensor, codes=None) -> None:
        """Write to the drive, and admit the newest tokens to the pool."""
        start, before = time.perf_counter_ns(), self.n
        self.window.append(kv)
        self.hits.extend(self.n)
        codes = zip(*codes, strict=True) if codes else [None] * len(kv)
        written = sum(log.append(part, own) for log, part, own in zip(self.logs, kv, codes, strict=True))
        if written:
            self.track.add("drive", "write", start, written)
        for row, pool in enumerate(self.pools):
            pool.resize(self.capacity(self.n))
            pool.pinned_from = self.n - math.ceil(self.pinned * self.n)
            pool.admit(np.arange(before, self.n), kv[row])

    def prefetch(self, row: int, positions: np.ndarray, for_step: bool = True) -> None:
        far = positions[self.window.far(positions)]
        missing = far[self.pools[row].slots(far, 0 if for_step else self.n // 4) < 0]

        def read() -> Records:
            start = time.perf_counter_ns()
            records, nbytes = self.logs[row].read(missing, exact=not for_step)
            if nbytes:
                self.track.add("drive", "prefetch", start, nbytes)
            return records

        self.ahead[for_step][row] = missing, self.reader.submit(read)

    def find(self, row: int, positions: np.ndarray, for_step: bool = True) -> tuple[Selection, Served]:
        """See `Store.find`. With `for_step` the tokens count as hits, and may be promoted when the step is settled."""
        far = self.window.far(positions)
        near = np.concatenate((np.arange(far.start), np.arange(far.stop, len(positions))))
        slots = self.pools[row].slots(positions[far], 0 if for_step else self.n // 4)
        hit, miss = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        parts = [
            (near, Records(self.window.records[row], self.window.slots(positions[near]))),
            (far.start + hit, Records(self.pools[row].records.data, slots[hit].astype(np.int64))),
        ]
        (expected, reading), prefetched = self.ahead[for_step].pop(row, (positions[:0], None)), 0
        if len(miss):
            tokens = positions[far][miss]
            known = np.isin(tokens, expected, kind="table")
            start = time.perf_counter_ns()  # records that the prefetch lacks are read before waiting for it
            records, nbytes = self.logs[row].read(tokens[~known], exact=not for_step)
            done = self.track.add("drive", "read", start, nbytes) if nbytes else time.perf_counter_ns()
            read, prefetched = [(np.flatnonzero(~known), records)], int(known.sum())
            if prefetched:
                guessed = reading.result()[np.searchsorted(expected, tokens[known])]
                read.append((np.flatnonzero(known), guessed))
                self.track.add("cpu", "wait", done)
            parts += [(far.start + miss[places], records) for places, records in read]
            if for_step:
                self.missed.append((row, tokens, Selection(read)))
                self.pools[row].passed(tokens)
        if for_step:
            self.hits.touch(row, positions)
        demoted, fresh = (int((slots == why).sum()) for why in (DEMOTED, ABSENT))
        return Selection(parts), Served(len(near), len(hit), len(miss), demoted, len(expected), prefetched, fresh)

    def parts(self) -> Iterator[torch.Tensor]:
        return (kv for kv, _ in self._blocks(self.stores.get(self.track.layer + 1)))

    def _blocks(self, following: "TieredStore | None" = None) -> Iterator[tuple[torch.Tensor, Served]]:
        """All records in order, of all sequences, and the tiers that served them. While a block is in use the next one
        is read, after the last the first of the following layer. A pool of less than a quarter is passed over: to read
        what lies in a row takes less time than to pick it from two places.
        """
        rows, size = range(self.geometry.batch), max(1, READ // self.geometry.batch // self.geometry.record_bytes)
        for start in range(0, self.n, size):
            found = [self.find(row, np.arange(start, min(start + size, self.n)), for_step=False) for row in rows]
            store, begin = (self, start + size) if start + size < self.n else (following, 0)
            for row in rows if store else ():
                store.prefetch(row, np.arange(begin, min(begin + size, store.n)), for_step=False)
            kv = [self.gather(selection) for selection, _ in found]
            yield kv[0][None] if len(kv) == 1 else torch.stack(kv), sum((served for _, served in found), Served())

    def all(self) -> tuple[torch.Tensor, Served]:
        out, at, total = self.geometry.empty(self.geometry.batch, self.n), 0, Served()
        for kv, served in self._blocks():
            out[:, at : at + kv.shape[1]] = kv
            at, total = at + kv.shape[1], total + served
        return out, total

    def settle(self) -> int:
        """Promote records that were read and that rank above a resident; as many are demoted (HKM rule 3)."""
        swapped = sum(self.pools[row].swap(tokens, selection) for row, tokens, selection in self.missed)
        self.missed = []
        if not self.hits.shared:
            self.hits.age()
        return swapped

    def truncate(self, n: int) -> None:
        self.ahead = {}, {}
        for log, pool in zip(self.logs, self.pools, strict=True):
            log.truncate(n)
            pool.truncate(n)
        self.hits.truncate(n)
        newest = np.arange(max(0, n - self.window.recent), n)
        self.window.refill(n, torch.stack([log.read(newest)[0].tensor() for log in self.logs]))

    def memory(self) -> dict[str, int]:
        host = sum(pool.nbytes for pool in self.pools) + sum(log.nbytes for log in self.logs)
        return {"device": self.window.nbytes, "host": host} | ({} if self.hits.shared else {"hits": self.hits.nbytes})
