"""The drive tier of torch records: `RecordFile` with a layer's geometry."""

import os  # noqa: F401  (tests make the system calls fail from here)
from pathlib import Path

import numpy as np
import torch

from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.record_file import MAX_READ, DriveError, RecordFile

__all__ = ["MAX_READ", "DirectDrive", "DriveError"]


class DirectDrive(RecordFile):
    """Records of `streams` streams, stream = layer * batch + row, in one private file."""

    def __init__(self, folder: Path, geometry: Geometry, streams: int, threads: int = 16, engine: str = "auto", **options):
        super().__init__(folder, geometry.record_bytes, streams, geometry.batch, threads, engine, **options)
        self.geometry = geometry

    def write(self, stream: int, start: int, records: torch.Tensor) -> None:
        """Write whole groups: records (n, 2, Hkv, D) of tokens start.. ; start and n are multiples of the group."""
        super().write(stream, start, self.geometry.as_bytes(records))

    def read(self, stream: int, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        """Records of any set of sorted positions: (k, 2, Hkv, D), and the bytes read from the drive for them."""
        out = self.geometry.empty(len(positions))
        return out, super().read(stream, positions, self.geometry.as_bytes(out))
