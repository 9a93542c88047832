"""One stream of records on a drive, with the newest ones held back until they fill whole blocks."""

import numpy as np
import torch

from hillinfer.tiers.drive import DirectDrive

HELD = 64  # tokens gathered before a write: one large write beats many of one block


class Stream:
    """Append-only records of one layer and batch row. `n` tokens, of which `flushed` are on the drive."""

    def __init__(self, drive: DirectDrive, index: int):
        self.drive, self.index, self.flushed = drive, index, 0
        self.tail = drive.geometry.empty(0)

    @property
    def n(self) -> int:
        return self.flushed + len(self.tail)

    def append(self, records: torch.Tensor) -> int:
        """Add records (n, 2, Hkv, D); returns the bytes written to the drive."""
        self.tail = torch.cat((self.tail, records))
        if len(self.tail) < HELD:
            return 0
        group = self.drive.geometry.group
        whole = len(self.tail) // group * group
        self.drive.write(self.index, self.flushed, self.tail[:whole])
        self.tail, self.flushed = self.tail[whole:].clone(), self.flushed + whole
        return whole * self.drive.geometry.record_bytes

    def read(self, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        """Records of sorted positions (k,): (k, 2, Hkv, D) and the bytes that the drive read."""
        split = int(np.searchsorted(positions, self.flushed))
        stored, nbytes = self.drive.read(self.index, positions[:split])
        if split == len(positions):
            return stored, nbytes
        held = self.tail[torch.from_numpy(positions[split:] - self.flushed)]
        return torch.cat((stored, held)), nbytes

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on. The block that n falls into comes back into memory, to be written again."""
        if n >= self.flushed:
            self.tail = self.tail[: n - self.flushed].clone()
            return
        kept = n // self.drive.geometry.group * self.drive.geometry.group
        self.tail = self.drive.read(self.index, np.arange(kept, n))[0]
        self.flushed = kept

    @property
    def nbytes(self) -> int:
        return self.tail.nbytes
