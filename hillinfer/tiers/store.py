"""The KV of one layer over its tiers. Two stores with one contract:

append(kv, coded)      take in kv (B, n, 2, Hkv, D); `coded` is what `KeyCodes.append` returned, for drives that score
fetch(row, positions)  records of sorted positions (k,), as (k, 2, Hkv, D) on the model's device, and where they were
parts()                (drive only) every record in order, (B, n, 2, Hkv, D) at a time, and where they were
locate(row, positions) the same without a copy, where all is in host memory: addresses for `native.attend`
all()                  every record, (B, N, 2, Hkv, D) on the model's device, and where they were
settle()               after a step: promote and demote; returns the tokens that changed places
truncate(n), memory(), n
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from hillinfer import native
from hillinfer.growable import Growable
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import SharedHits
from hillinfer.tiers.pool import DEMOTED, HotPool
from hillinfer.tiers.stream import Stream
from hillinfer.tiers.window import Window

PART = 512  # tokens that are fetched at once where all are: what a prefill chunk needs beside its scores stays small


@dataclass
class Found:
    """Where the records of one fetch were, and what moving them took."""

    device: int = 0  # tokens
    host: int = 0
    drive: int = 0
    demoted: int = 0  # those of `drive` that the hot pool had once held; the rest never were in it
    guessed: int = 0  # tokens that were prefetched
    prefetched: int = 0  # those of `drive` that had been
    work: list[tuple[str, str, int, int, int]] = field(default_factory=list)  # (lane, kind, start_ns, end_ns, bytes)

    def counts(self) -> tuple[int, ...]:
        """device, host, drive, demoted, guessed, prefetched"""
        return self.device, self.host, self.drive, self.demoted, self.guessed, self.prefetched

    def __add__(self, other: "Found") -> "Found":
        return Found(*map(int.__add__, self.counts(), other.counts()), self.work + other.work)


class Brought:
    """What one fetch read from the drive, in the one or two buffers that it came in: `brought[index]` copies some,
    `copy_to` into slots of a buffer.

    parts  places among the tokens, records, and which of them (None: all in order)
    """

    def __init__(self, parts: list[tuple[np.ndarray, torch.Tensor, np.ndarray | None]]):
        self.parts = parts

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            _, records, rows = self.parts[0]
            return records[index if rows is None else torch.from_numpy(rows)[index]]
        out, wanted = None, index.numpy()
        for places, records, rows in self.parts:
            out = records.new_empty((len(wanted), *records.shape[1:])) if out is None else out
            mine = np.flatnonzero(np.isin(wanted, places, kind="table"))
            at = np.searchsorted(places, wanted[mine])
            out[torch.from_numpy(mine)] = records[torch.from_numpy(at if rows is None else rows[at])]
        return out

    def copy_to(self, index: np.ndarray, out: torch.Tensor, slots: np.ndarray) -> None:
        """out[slots] = self[index]; slots differ."""
        if not native.available():
            out[torch.from_numpy(slots)] = self[torch.from_numpy(index)]
            return
        addresses = np.empty(sum(len(places) for places, _, _ in self.parts), np.int64)
        for places, records, rows in self.parts:
            addresses[places] = _addresses(records, rows, len(places))
        native.copy(addresses[index], out, slots, torch.get_num_threads())


def _addresses(records: torch.Tensor, rows: np.ndarray | None, n: int) -> np.ndarray:
    """Of these rows of records (None: the first n), int64."""
    width = records.stride(0) * records.element_size()
    return records.data_ptr() + (np.arange(n) if rows is None else rows) * width


class HostStore:
    """All records in one growable buffer, in host memory or, with `resident`, on the model's device."""

    def __init__(self, geometry: Geometry, resident: bool = False):
        self.geometry = geometry
        self.tier = "device" if resident and geometry.device.type != "cpu" else "host"
        device = geometry.device if self.tier == "device" else "cpu"
        self.buffer = Growable((geometry.batch, 0, *geometry.record_shape), 1, geometry.dtype, device)

    @property
    def n(self) -> int:
        return self.buffer.n

    def append(self, kv: torch.Tensor, coded=None) -> list:
        self.buffer.append(kv)
        return []

    def fetch(self, row: int, positions: np.ndarray, ahead=None) -> tuple[torch.Tensor, Found]:
        start = time.perf_counter_ns()
        index = torch.from_numpy(positions).to(self.buffer.data.device)
        records = self.buffer.data[row].index_select(0, index)
        return self._to_device(records, start, "gather", len(positions))

    def locate(self, row: int, positions: np.ndarray, ahead=None) -> tuple[tuple[np.ndarray, list], Found]:
        """As `fetch`, without a copy: the records' addresses int64 (k,), and what must live as long."""
        start, data, width = time.perf_counter_ns(), self.buffer.data, self.geometry.record_bytes
        addresses = data.data_ptr() + row * data.stride(0) * data.element_size() + positions * width
        work = [("cpu", "gather", start, time.perf_counter_ns(), len(positions) * width)]  # in place: no byte moves
        return (addresses, [data]), Found(**{self.tier: len(positions)}, work=work)

    def all(self) -> tuple[torch.Tensor, Found]:
        """On a machine without a GPU this is a view: nothing is copied."""
        return self._to_device(self.buffer.view(), time.perf_counter_ns(), "view", self.n * self.geometry.batch)

    def _to_device(self, records: torch.Tensor, start: int, kind: str, tokens: int) -> tuple[torch.Tensor, Found]:
        found = Found(**{self.tier: tokens})
        moved = time.perf_counter_ns()
        found.work.append(
            ("gpu" if self.tier == "device" else "cpu", kind, start, moved, 0 if kind == "view" else records.nbytes)
        )
        if records.device != self.geometry.device:
            records = records.to(self.geometry.device)
            found.work.append(("link", "transfer", moved, time.perf_counter_ns(), records.nbytes))
        return records, found

    def settle(self) -> int:
        return 0

    def truncate(self, n: int) -> None:
        self.buffer.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.buffer.reorder(rows)

    def memory(self) -> dict[str, int]:
        return {self.tier: self.buffer.view().nbytes}


class DriveStore:
    """Device window, hot pool in host memory, and every record on the drive.

    streams   one for each sequence of the batch
    pinned    share of the tokens, the newest, that never leaves the pool (HKM rule 1: alpha)
    capacity  the pool's size in tokens for each sequence at n cached tokens
    """

    def __init__(
        self,
        geometry: Geometry,
        streams: list[Stream],
        hits: SharedHits,
        window: Window,
        pinned: float,
        capacity: Callable[[int], int],
    ):
        self.geometry, self.streams = geometry, streams
        self.hits, self.window, self.pinned, self.capacity = hits, window, pinned, capacity
        self.pools = [HotPool(geometry, row, hits) for row in range(geometry.batch)]
        self.missed: list[tuple[int, np.ndarray, Brought]] = []  # what this step read from the drive

    @property
    def n(self) -> int:
        return self.window.n

    def append(self, kv: torch.Tensor, coded=None) -> list:
        """Write to the drive and admit the newest to the pool. Returns the work done, as in `Found.work`."""
        start, before = time.perf_counter_ns(), self.n
        self.window.append(kv)
        self.hits.extend(self.n)
        records = kv.to("cpu")
        coded = zip(*coded, strict=True) if coded else [None] * len(records)
        parts = zip(self.streams, records, coded, strict=True)
        written = sum(stream.append(part, own) for stream, part, own in parts)
        end = time.perf_counter_ns()
        for row, pool in enumerate(self.pools):
            pool.resize(self.capacity(self.n))
            pool.pinned_from = self.n - math.ceil(self.pinned * self.n)
            pool.admit(np.arange(before, self.n), records[row])
        return [("drive", "write", start, end, written)] if written else []

    def missing(self, row: int, positions: np.ndarray) -> np.ndarray:
        """Those of the positions that only the drive has."""
        far = positions[self.window.far(positions)]
        return far[self.pools[row].slots(far) < 0]

    def read(self, row: int, positions: np.ndarray, exact: bool = False) -> tuple[torch.Tensor, np.ndarray | None, int]:
        """Records of sorted positions (k,) from the drive, which of them (None: all in order), and the bytes that it
        read. Any thread may.
        """
        return self.streams[row].lend(positions)

    def fetch(self, row: int, positions: np.ndarray, ahead=None, promote: bool = True) -> tuple[torch.Tensor, Found]:
        """`ahead` has records on their way from the drive: sorted `positions`; `records()` waits for them."""
        sources, found = self._find(row, positions, ahead, promote)
        start = time.perf_counter_ns()
        out, far = self.geometry.empty(len(positions), device=self.geometry.device), 0
        for index, records, slots in sources:
            part = records if slots is None else records.index_select(0, torch.from_numpy(slots).to(records.device))
            out[torch.from_numpy(index).to(out.device)] = part.to(out.device)
            far += part.nbytes if part.device != out.device else 0
        found.work.append(
            (
                "link" if far else "cpu",
                "transfer" if far else "gather",
                start,
                time.perf_counter_ns(),
                far or out.nbytes,
            )
        )
        return out, found

    def locate(self, row: int, positions: np.ndarray, ahead=None) -> tuple[tuple[np.ndarray, list], Found]:
        """As `fetch`, without a copy: the records' addresses int64 (k,), and what must live as long."""
        sources, found = self._find(row, positions, ahead, True)
        start, moved = time.perf_counter_ns(), found.host * self.geometry.record_bytes
        addresses = np.empty(len(positions), np.int64)
        for index, records, slots in sources:
            addresses[index] = _addresses(records, slots, len(index))
        found.work.append(("cpu", "gather", start, time.perf_counter_ns(), moved))  # in place
        return (addresses, sources), found

    def _find(self, row: int, positions: np.ndarray, ahead, promote: bool) -> tuple[list[tuple], Found]:
        """Where the records are, once those that only the drive has are read: (places in positions, records, which of
        them or None for all in order), and `Found`.
        """
        far = self.window.far(positions)
        near = np.concatenate((np.arange(far.start), np.arange(far.stop, len(positions))))
        sources = [(near, self.window.records[row], self.window.slots(positions[near]))]
        slots = self.pools[row].slots(positions[far])
        hit, miss = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        found = Found(len(near), len(hit), len(miss), guessed=len(ahead.positions) if ahead else 0)
        sources.append((far.start + hit, self.pools[row].records.data, slots[hit].astype(np.int64)))
        if not len(miss):
            return sources, found
        tokens = positions[far][miss]
        brought = np.isin(tokens, ahead.positions, kind="table") if ahead else np.zeros(len(tokens), bool)
        found.prefetched, found.demoted = int(brought.sum()), int((slots == DEMOTED).sum())
        start = time.perf_counter_ns()
        missed, rows, nbytes = self.read(row, tokens[~brought], not promote)  # what the guess lacks, before waiting
        read = time.perf_counter_ns()
        if nbytes:
            found.work.append(("drive", "read", start, read, nbytes))
        parts = [(np.flatnonzero(~brought), missed, rows)]
        if found.prefetched:
            where, (guessed, rows) = np.searchsorted(ahead.positions, tokens[brought]), ahead.records()
            parts.append((np.flatnonzero(brought), guessed, where if rows is None else rows[where]))
            found.work.append(("cpu", "wait", read, time.perf_counter_ns(), 0))
        sources += [(far.start + miss[places], records, rows) for places, records, rows in parts]
        if promote:
            self.missed.append((row, tokens, Brought(parts)))
        return sources, found

    def parts(self) -> Iterator[tuple[torch.Tensor, Found]]:
        for start in range(0, self.n, PART):
            positions = np.arange(start, min(start + PART, self.n))
            rows = [self.fetch(row, positions, promote=False) for row in range(self.geometry.batch)]
            yield torch.stack([records for records, _ in rows]), sum((part for _, part in rows), Found())

    def all(self) -> tuple[torch.Tensor, Found]:
        found, start = Found(), 0
        out = self.geometry.empty(self.geometry.batch, self.n, device=self.geometry.device)
        for kv, part in self.parts():
            out[:, start : start + kv.shape[1]] = kv
            start, found = start + kv.shape[1], found + part
        return out, found

    def settle(self) -> int:
        """Promote what was fetched where the hit table ranks it above a resident; as many are demoted (HKM rule 3)."""
        swapped = sum(self.pools[row].swap(tokens, records) for row, tokens, records in self.missed)
        self.missed = []
        if not self.hits.shared:
            self.hits.age()
        return swapped

    def truncate(self, n: int) -> None:
        for stream, pool in zip(self.streams, self.pools, strict=True):
            stream.truncate(n)
            pool.truncate(n)
        self.hits.truncate(n)
        newest = np.arange(max(0, n - self.window.recent), n)
        self.window.refill(n, torch.stack([stream.read(newest)[0] for stream in self.streams]).to(self.geometry.device))

    def memory(self) -> dict[str, int]:
        host = sum(pool.nbytes for pool in self.pools) + sum(stream.nbytes for stream in self.streams)
        return {"device": self.window.nbytes, "host": host} | ({} if self.hits.shared else {"hits": self.hits.nbytes})
