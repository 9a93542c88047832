"""The drive tier of torch records: `RecordFile` with a layer's geometry."""

import os  # noqa: F401  (tests make the system calls fail from here)
import weakref
from pathlib import Path

import numpy as np
import torch

from hillinfer.errors import DriveError
from hillinfer.tiers.block_file import MAX_READ
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.record_file import RecordFile

__all__ = ["MAX_READ", "DirectDrive", "DriveError"]


class DirectDrive(RecordFile):
    """Records of `streams` streams, stream = layer * batch + row, in one private file."""

    def __init__(
        self, folder: Path, geometry: Geometry, streams: int, threads: int = 16, engine: str = "auto", **options
    ):
        super().__init__(folder, geometry.record_bytes, streams, geometry.batch, threads, engine, **options)
        self.geometry = geometry

    def write(self, stream: int, start: int, records: torch.Tensor) -> None:
        """Write whole groups: records (n, 2, Hkv, D) of tokens start.. ; start and n are multiples of the group."""
        super().write(stream, start, self.geometry.as_bytes(records))

    def read(self, stream: int, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        """Records of any set of sorted positions: (k, 2, Hkv, D), and the bytes read from the drive for them."""
        out = self.geometry.empty(len(positions))
        return out, super().read(stream, positions, self.geometry.as_bytes(out))

    def lend(self, stream: int, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray | None, int]:
        """As `read`, but where the drive put them: records (m, 2, Hkv, D), which of them these are (k,) or None
        for all in order, and the bytes read. The memory is used again once nobody holds the records.
        """
        if not len(positions):
            return self.geometry.empty(0), None, 0
        buffer, places, nbytes = self.bring(stream, positions)
        rows, rest = np.divmod(places, self.record_bytes)
        if rest.any():  # records that fill no whole blocks do not lie side by side in the buffer
            out = self.geometry.empty(len(positions))
            self.copy(buffer, places, self.geometry.as_bytes(out))
            self.give_back(buffer)
            return out, None, nbytes
        lent = buffer[: nbytes // self.record_bytes * self.record_bytes]
        weakref.finalize(lent, self.give_back, buffer).atexit = False
        return torch.from_numpy(lent).view(self.geometry.dtype).view(-1, *self.geometry.record_shape), rows, nbytes
