"""INT4 copies of records on the drive, read instead of the records where transfer is the bottleneck (LeoAM).

Symmetric codes with an fp16 scale per 32 channels: 4.5 bits a value. An INT4 record serves one step and never enters
the hot pool, so that its error does not persist.
"""

import time
from dataclasses import replace

import numpy as np
import torch

from hillinfer.evaluator import codes
from hillinfer.systems.leoam.compression import Compression
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import SharedHits
from hillinfer.tiers.log import RecordLog
from hillinfer.tiers.records import Records, Selection
from hillinfer.tiers.tiered_store import TieredStore

GROUP, TOP = 32, codes.TOP[4]


def packed_geometry(geometry: Geometry) -> Geometry:
    """The shape of packed records: bytes, (2, Hkv, D/2 + 2 per group)."""
    dim = geometry.head_dim
    width = -(-dim // 2) + 2 * -(-dim // GROUP)
    return replace(geometry, head_dim=width, dtype=torch.uint8, device=torch.device("cpu"))


def pack(records: torch.Tensor) -> torch.Tensor:
    """Records (n, 2, Hkv, D) -> uint8 (n, 2, Hkv, width)."""
    dim = records.shape[-1]
    values = torch.nn.functional.pad(records.float(), (0, -dim % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (values.abs().amax(-1, keepdim=True) / TOP).clamp(1e-7, 65504).to(torch.float16)
    rounded = (values / scale.float()).round_().clamp_(-TOP, TOP).to(torch.int8).flatten(-2)[..., : dim + dim % 2]
    return torch.cat((codes.pack(rounded, 4).view(torch.uint8), scale.flatten(-2).view(torch.uint8)), -1)


def unpack(packed: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack`, within 1/14 of a group's largest value: (n, 2, Hkv, D)."""
    nibbles, scale = packed.tensor_split((-(-dim // 2),), -1)
    scale = scale.contiguous().view(torch.float16).float().repeat_interleave(GROUP, -1)[..., :dim]
    return (codes.unpack(nibbles.view(torch.int8), 4)[..., :dim] * scale).to(dtype)


def subset(records: Selection, index: np.ndarray) -> Selection:
    """The records at these sorted places, in their order."""
    parts = []
    for places, own in records.parts:
        mine = np.isin(places, index, kind="table")
        parts.append((np.searchsorted(index, places[mine]), own[np.flatnonzero(mine)]))
    return Selection(parts)


class PackedLog(RecordLog):
    """A log with INT4 copies of its records, which it reads for the records of lowest rank in the hit table.

    packed  the log of the copies; `PackedStore` appends to it
    """

    def __init__(self, *args, packed: RecordLog, compression: Compression):
        super().__init__(*args)
        self.packed, self.compression, self.row = packed, compression, self.stream % self.geometry.batch
        self.hits: SharedHits | None = None  # set by `PackedStore`
        self.coarse = np.zeros(0, bool)  # tokens last read in INT4

    def append(self, records: torch.Tensor, codes=None) -> int:
        self.coarse = np.pad(self.coarse, (0, len(records)))
        return super().append(records)

    def read(self, positions: np.ndarray, exact: bool = True) -> tuple[Records, int]:
        full, small = self.file.record_bytes, self.packed.file.record_bytes
        k = 0 if exact else round(self.compression.share(len(positions), full, small) * len(positions))
        coarse = np.zeros(len(positions), bool)
        coarse[np.argsort(self.hits.rank[self.row, positions], kind="stable")[:k]] = True
        self.coarse[positions] = coarse
        start = time.perf_counter()
        records, nbytes = super().read(positions[~coarse])
        if k:
            packed, more = self.packed.read(positions[coarse])
            nbytes += more
        self.compression.observe("per_byte", time.perf_counter() - start, nbytes)
        if not k:
            return records, nbytes
        start, out = time.perf_counter(), self.geometry.empty(len(positions))
        out[torch.from_numpy(~coarse)] = records.tensor()
        out[torch.from_numpy(coarse)] = unpack(packed.tensor(), self.geometry.head_dim, out.dtype)
        self.compression.observe("per_token", time.perf_counter() - start, k)
        return Records(out), nbytes

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.packed.truncate(n)
        self.coarse = self.coarse[:n]

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.packed.nbytes


class PackedStore(TieredStore):
    """A `TieredStore` over `PackedLog`s."""

    def __init__(self, *args):
        super().__init__(*args)
        for log in self.logs:
            log.hits = self.hits

    def append(self, kv: torch.Tensor, codes=None) -> None:
        start = time.perf_counter_ns()
        written = sum(log.packed.append(pack(records)) for log, records in zip(self.logs, kv, strict=True))
        if written:
            self.track.add("drive", "write", start, written)
        super().append(kv, codes)

    def settle(self) -> int:
        """Promote full records only."""
        exact = [np.flatnonzero(~self.logs[row].coarse[tokens]) for row, tokens, _ in self.missed]
        missed = zip(self.missed, exact, strict=True)
        self.missed = [(row, tokens[index], subset(records, index)) for (row, tokens, records), index in missed]
        return super().settle()
