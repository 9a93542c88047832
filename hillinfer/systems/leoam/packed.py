"""INT4 copies of records on the drive, read in their place where transfer takes longest (LeoAM).

Symmetric codes with an fp16 scale for every 32 channels: 4.5 bits a value. An INT4 record serves one step and never
enters the hot pool, so that its error does not persist.
"""

import time
from dataclasses import replace

import numpy as np
import torch

from hillinfer.systems.leoam.compression import Compression
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import SharedHits
from hillinfer.tiers.log import RecordLog
from hillinfer.tiers.records import Records
from hillinfer.tiers.tiered_store import TieredStore

GROUP, TOP = 32, 7


def packed_geometry(geometry: Geometry) -> Geometry:
    """The shape of packed records: bytes, (2, Hkv, D/2 + 2 for each group)."""
    dim = geometry.head_dim
    width = -(-dim // 2) + 2 * -(-dim // GROUP)
    return replace(geometry, head_dim=width, dtype=torch.uint8, device=torch.device("cpu"))


def pack(records: torch.Tensor) -> torch.Tensor:
    """Records (n, 2, Hkv, D) -> uint8 (n, 2, Hkv, width)."""
    dim = records.shape[-1]
    values = torch.nn.functional.pad(records.float(), (0, -dim % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (values.abs().amax(-1, keepdim=True) / TOP).clamp(1e-7, 65504).to(torch.float16)
    codes = (values / scale.float()).round_().clamp_(-TOP, TOP).to(torch.int8).flatten(-2)[..., : dim + dim % 2]
    nibbles = (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
    return torch.cat((nibbles.view(torch.uint8), scale.squeeze(-1).contiguous().view(torch.uint8)), -1)


def unpack(packed: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack`, to 1/14 of a group's largest value: (n, 2, Hkv, D)."""
    nibbles, scale = packed.split((-(-dim // 2), packed.shape[-1] - -(-dim // 2)), -1)
    nibbles = nibbles.contiguous().view(torch.int8)
    codes = torch.stack(((nibbles << 4) >> 4, nibbles >> 4), -1).flatten(-2)[..., :dim]
    scale = scale.contiguous().view(torch.float16).float().repeat_interleave(GROUP, -1)[..., :dim]
    return (codes * scale).to(dtype)


class PackedLog:
    """A `RecordLog` with INT4 copies beside its records, which are read in place of the records of lowest rank."""

    def __init__(self, exact: RecordLog, packed: RecordLog, compression: Compression, hits: SharedHits, row: int):
        self.exact, self.packed, self.compression, self.hits, self.row = exact, packed, compression, hits, row
        self.coarse = np.zeros(0, bool)  # tokens whose last read was INT4

    @property
    def n(self) -> int:
        return self.exact.n

    def append(self, records: torch.Tensor, codes=None) -> int:
        """The full records; `PackedStore` appends the INT4 copies."""
        self.coarse = np.pad(self.coarse, (0, len(records)))
        return self.exact.append(records)

    def read(self, positions: np.ndarray, exact: bool = True) -> tuple[Records, int]:
        """See `RecordLog.read`."""
        full, small = self.exact.file.record_bytes, self.packed.file.record_bytes
        k = 0 if exact else round(self.compression.share(len(positions), full, small) * len(positions))
        coarse = np.zeros(len(positions), bool)
        coarse[np.argsort(self.hits.rank[self.row, positions], kind="stable")[:k]] = True
        self.coarse[positions] = coarse
        start = time.perf_counter()
        records, nbytes = self.exact.read(positions[~coarse])
        if k:
            codes, more = self.packed.read(positions[coarse])
            nbytes += more
        self.compression.note("per_byte", time.perf_counter() - start, nbytes)
        if not k:
            return records, nbytes
        start, size = time.perf_counter(), self.exact.geometry
        out = size.empty(len(positions))
        out[torch.from_numpy(~coarse)] = records.tensor()
        out[torch.from_numpy(coarse)] = unpack(codes.tensor(), size.head_dim, size.dtype)
        self.compression.note("per_token", time.perf_counter() - start, k)
        return Records(out), nbytes

    def truncate(self, n: int) -> None:
        self.exact.truncate(n)
        self.packed.truncate(n)
        self.coarse = self.coarse[:n]

    @property
    def nbytes(self) -> int:
        return self.exact.nbytes + self.packed.nbytes


class PackedStore(TieredStore):
    """A `TieredStore` that reads a share of the records in INT4.

    compression  says which share, and learns how long reads took
    packed       a log of INT4 records for each sequence
    """

    def __init__(self, *args, compression: Compression, packed: list[RecordLog]):
        super().__init__(*args)
        logs = zip(self.logs, packed, strict=True)
        self.logs = [PackedLog(*pair, compression, self.hits, row) for row, pair in enumerate(logs)]

    def append(self, kv: torch.Tensor, codes=None) -> None:
        start = time.perf_counter_ns()
        written = sum(log.packed.append(pack(own)) for log, own in zip(self.logs, kv.to("cpu"), strict=True))
        if written:
            self.track.add("drive", "write", start, written)
        super().append(kv, codes)

    def settle(self) -> int:
        """Promote full records only."""
        full = [np.flatnonzero(~self.logs[row].coarse[tokens]) for row, tokens, _ in self.missed]
        missed = zip(self.missed, full, strict=True)
        self.missed = [(row, tokens[own], records.subset(own)) for (row, tokens, records), own in missed]
        return super().settle()
