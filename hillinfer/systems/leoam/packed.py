"""Records in INT4 beside the full ones on the drive, to be read in their place where transfer takes longest (LeoAM).

Symmetric codes with an fp16 scale for every 32 channels: 4.5 bits a value. A record read so is used for one step and
never enters the hot pool, so that an error does not stay.
"""

import time
from dataclasses import replace

import numpy as np
import torch

from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.store import Brought, DriveStore
from hillinfer.tiers.stream import Stream

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


class PackedStore(DriveStore):
    """A `DriveStore` that reads a share of the records in INT4, those of lowest rank.

    compression  says which share (`pipeline.compression.Compression`), and is told what reading took
    packed       a stream of packed records for each sequence
    """

    def __init__(self, *args, compression, packed: list[Stream]):
        super().__init__(*args)
        self.compression, self.packed = compression, packed
        self.coarse = [np.zeros(0, bool) for _ in packed]  # tokens whose last read was INT4
        self.packed_tokens = self.read_tokens = 0

    def append(self, kv: torch.Tensor, coded=None) -> list:
        start = time.perf_counter_ns()
        written = sum(stream.append(pack(own)) for stream, own in zip(self.packed, kv.to("cpu"), strict=True))
        work = [("drive", "write", start, time.perf_counter_ns(), written)] if written else []
        work += super().append(kv, coded)
        self.coarse = [np.pad(mask, (0, max(0, self.n - len(mask)))) for mask in self.coarse]
        return work

    def read(self, row: int, positions: np.ndarray, exact: bool = False) -> tuple[torch.Tensor, np.ndarray | None, int]:
        full, small = self.geometry.record_bytes, self.packed[row].drive.record_bytes
        k = 0 if exact else round(self.compression.share(len(positions), full, small) * len(positions))
        coarse = np.zeros(len(positions), bool)
        coarse[np.argsort(self.hits.rank[row, positions], kind="stable")[:k]] = True
        self.coarse[row][positions] = coarse
        start = time.perf_counter()
        records, rows, nbytes = super().read(row, positions[~coarse])
        if k:
            codes, more = self.packed[row].read(positions[coarse])
            nbytes += more
        self.compression.note("per_byte", time.perf_counter() - start, nbytes)
        self.packed_tokens, self.read_tokens = self.packed_tokens + k, self.read_tokens + len(positions)
        if not k:
            return records, rows, nbytes
        start = time.perf_counter()
        out = self.geometry.empty(len(positions))
        out[torch.from_numpy(~coarse)] = records if rows is None else records[torch.from_numpy(rows)]
        out[torch.from_numpy(coarse)] = unpack(codes, self.geometry.head_dim, self.geometry.dtype)
        self.compression.note("per_token", time.perf_counter() - start, k)
        return out, None, nbytes

    def settle(self) -> int:
        whole = []
        for row, tokens, records in self.missed:
            exact = np.flatnonzero(~self.coarse[row][tokens])
            whole.append(
                (row, tokens[exact], Brought([(np.arange(len(exact)), records[torch.from_numpy(exact)], None)]))
            )
        self.missed = whole
        return super().settle()

    def truncate(self, n: int) -> None:
        super().truncate(n)
        for stream in self.packed:
            stream.truncate(n)
        self.coarse = [mask[:n] for mask in self.coarse]

    def memory(self) -> dict[str, int]:
        held = super().memory()
        return held | {"host": held["host"] + sum(stream.nbytes for stream in self.packed)}
