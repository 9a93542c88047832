"""The contract of a layer's KV store, and the store that keeps everything in memory.

A store attends: it gets a query and positions and returns the output with its logsumexp, by which parts that were
attended to on different devices, or in a drive, are merged. It records its work on its `Track`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from hillinfer import attention
from hillinfer.errors import UsageError
from hillinfer.growable import Growable
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.records import Records, Selection
from hillinfer.timeline import Served, Track

Watch = Callable[[torch.Tensor, torch.Tensor | None], None]


class Store:
    """KV of one layer over its tiers.

    `n` is the number of tokens of each sequence. A subclass implements `append`, `find` or `fetch`, `all`, `truncate`
    and `memory`, in memory also `reorder`, and sets the flags that hold for it.
    """

    can_prefetch = False  # reads from a drive, so that a guess of the next step's tokens is of use
    scores_keys = False  # the drive scores keys, and needs the codes of new ones
    in_place = True  # records can be attended to where they lie

    geometry: Geometry
    track: Track
    n: int

    def append(self, kv: torch.Tensor, codes=None) -> None:
        """Add kv (B, n, 2, Hkv, D); `codes` are the new keys' codes and the scales' doublings, if `scores_keys`."""
        raise NotImplementedError

    def attend(
        self,
        query: torch.Tensor,
        picks: list[np.ndarray | None] | tuple[torch.Tensor, torch.Tensor | None],
        valid: torch.Tensor | None,
        scaling: float,
        watch: Watch | None = None,
        softcap: float = 0.0,
        sums: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query token (B, H, 1, D): (B, 1, H, D), and the logsumexp of its logits, fp32 (B, H).

        picks  each sequence's sorted positions (k,), or None for all tokens; or as `Policy.choose`
        valid  bool (B, n) where the selection was made, False for padding; None where there is none
        sums   False: the logsumexp may be None
        watch  called with the records attended to, (B, k, 2, Hkv, D), and which of them are valid, (B, k) or None
        """
        whole = isinstance(picks, list) and all(pick is None for pick in picks)
        if isinstance(picks, list) and not whole:
            picks = [np.arange(self.n) if pick is None else pick for pick in picks]
        if watch is None and (self.in_place or whole) and attention.is_native(query):
            shown = None if valid is None else valid.numpy()
            rows, side, keep, served = self._locate(picks, whole, shown)
            attended = self.n * len(rows) if whole and shown is None else sum(map(len, rows))
            with self.track.span("cpu", "attend", attended * self.geometry.record_bytes):
                out, lse = attention.over_records(query, rows, self.geometry.kv_heads, scaling, side, softcap)
            del keep  # until here the records had to stay where they are
        else:
            kv, shown, served = self._gather(picks, whole, valid)
            attended = kv.shape[1] * len(kv) if shown is None else shown.sum()
            shown = None if shown is None else attention.to_device(shown, kv.device)
            with self.track.span(self.lane, "attend", kv.nbytes):
                out, lse = attention.over_tensors(query, kv, shown, scaling, softcap, sums)
            if watch is not None:
                watch(kv, shown)
        start = time.perf_counter_ns()
        swapped = self.settle()
        if swapped:
            self.track.add("cpu", "swap", start, swapped * self.geometry.record_bytes)
        self.track.count(self.n, attended, served, swapped)
        return out, lse

    def prefetch(self, row: int, positions: np.ndarray) -> None:
        """Start to read what only the drive has of these positions, for the coming step. Any thread may call it."""

    def scores(self, row: int, query: torch.Tensor, score: Callable, scanned: int) -> np.ndarray:
        """Scores of a sequence's tokens, int32 (Hkv*G, n), for a quantised query int8 (Hkv, G, D).

        score(positions)  the host's own scores of these (m,), or of all for None; `scanned` bytes for all
        """
        with self.track.span("cpu", "score", scanned):
            return score(None)

    def find(self, row: int, positions: np.ndarray) -> tuple[Records | Selection, Served]:
        """Where the records of sorted positions (k,) lie, once those on the drive are read."""
        raise NotImplementedError

    def fetch(self, row: int, positions: np.ndarray) -> tuple[torch.Tensor, Served]:
        """Records of sorted positions (k,), (k, 2, Hkv, D), and the tiers that served them."""
        records, served = self.find(row, positions)
        return self.gather(records), served

    def gather(self, records: Records | Selection) -> torch.Tensor:
        """A copy of records, (k, 2, Hkv, D)."""
        with self.track.span(self.lane, "gather", len(records) * self.geometry.record_bytes):
            return records.tensor()

    @property
    def lane(self) -> str:
        """Of the device where records are."""
        return "cpu" if self.geometry.device.type == "cpu" else "gpu"

    def all(self) -> tuple[torch.Tensor, Served]:
        """All records, (B, n, 2, Hkv, D), and the tiers that served them."""
        raise NotImplementedError

    def parts(self) -> Iterator[torch.Tensor]:
        """All records in order, (B, m, 2, Hkv, D) at a time."""
        yield self.all()[0]

    def settle(self) -> int:
        """End a step: promote and demote, or free buffers. Returns the tokens that changed places."""
        return 0

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on."""
        raise NotImplementedError

    def reorder(self, rows: torch.Tensor) -> None:
        """Select these sequences of the batch, in this order. UsageError for a store on a drive."""
        raise UsageError(
            "sequences on a drive cannot be copied or reordered (beams, num_return_sequences): use num_beams=1, "
            "or keep the KV in memory (no drive)"
        )

    def memory(self) -> dict[str, int]:
        """Bytes held, by `device`, `host`, `hits` and `page_cache`."""
        raise NotImplementedError

    def _locate(self, picks: list, whole: bool, shown: np.ndarray | None) -> tuple[list, int | None, list, Served]:
        """Each sequence's records as `native.attend` takes them: rows and side; their owners; who served them."""
        if whole:
            kv, served = self.all()
            rows, side = attention.strided(kv)
            if shown is not None:
                rows = [base + np.flatnonzero(own) * width for (base, width, _), own in zip(rows, shown, strict=True)]
            return rows, side, [kv], served
        rows, keep, total = [], [], None
        for row, positions in enumerate(picks):
            selection, served = self.find(row, positions)
            start = time.perf_counter_ns()
            addresses = selection.addresses()
            self.track.add("cpu", "gather", start, served.host * self.geometry.record_bytes)  # in place: no byte moves
            rows.append(addresses if shown is None else addresses[shown[row][positions]])
            keep.append(selection)
            total = served if total is None else total + served
        return rows, None, keep, total

    def _gather(self, picks: list, whole: bool, valid) -> tuple[torch.Tensor, torch.Tensor | None, Served]:
        """Each sequence's records as one tensor, kv (B, k, 2, Hkv, D), and which are valid, in host memory; short rows
        are padded.
        """
        if whole:
            kv, served = self.all()
            return kv, valid, served
        if isinstance(picks, tuple):
            return self.take(*picks, valid)
        parts = [self.fetch(row, positions) for row, positions in enumerate(picks)]
        served = sum((served for _, served in parts), Served())
        if valid is None and len({len(pick) for pick in picks}) == 1:
            return parts[0][0][None] if len(parts) == 1 else torch.stack([kv for kv, _ in parts]), None, served
        longest = max(len(pick) for pick in picks)
        kv = parts[0][0].new_zeros((len(parts), longest, *self.geometry.record_shape))
        shown = torch.zeros((len(parts), longest), dtype=torch.bool, device="cpu")
        for row, (pick, (records, _)) in enumerate(zip(picks, parts, strict=True)):
            kv[row, : len(pick)] = records
            shown[row, : len(pick)] = True if valid is None else valid[row][torch.from_numpy(pick)]
        return kv, shown, served


class HostStore(Store):
    """All records in one growable buffer."""

    def __init__(self, geometry: Geometry, track: Track, tokens: int = 0):
        self.geometry, self.track = geometry, track
        self.tier = "host" if geometry.device.type == "cpu" else "device"
        self.buffer = Growable((geometry.batch, 0, *geometry.record_shape), 1, geometry.dtype, geometry.device)
        if self.tier == "device":  # layers that grow in turn would leave holes of every older size
            self.buffer.reserve(tokens)

    @property
    def n(self) -> int:
        return self.buffer.n

    def append(self, kv: torch.Tensor, codes=None) -> None:
        self.buffer.append(kv)

    def find(self, row: int, positions: np.ndarray) -> tuple[Records, Served]:
        return Records(self.buffer.data[row], positions), Served(**{self.tier: len(positions)})

    def take(self, positions: torch.Tensor, counts: torch.Tensor | None, valid: torch.Tensor | None) -> tuple:
        """`_gather` on the records' device, without a wait."""
        with self.track.span(self.lane, "gather", positions.numel() * self.geometry.record_bytes):
            rows = torch.arange(len(positions), dtype=torch.int64, device=positions.device)[:, None]
            kv, seen = self.buffer.data[rows, positions], None if valid is None else valid.gather(1, positions)
        shown = seen if counts is None else counts if seen is None else counts & seen
        return kv, shown, Served(device=positions.numel() if counts is None else counts.sum())

    def all(self) -> tuple[torch.Tensor, Served]:
        """A view: nothing is copied."""
        self.track.add(self.lane, "view", time.perf_counter_ns())
        return self.buffer.view(), Served(**{self.tier: self.n * self.geometry.batch})

    def truncate(self, n: int) -> None:
        self.buffer.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.buffer.reorder(rows)
        self.geometry = replace(self.geometry, batch=len(rows))

    def memory(self) -> dict[str, int]:
        return {self.tier: self.buffer.view().nbytes}
