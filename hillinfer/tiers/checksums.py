"""A checksum of every block of a drive's file, kept in host memory: 4 bytes for 4 KiB. numpy only.

CRC-32, as zlib's. In a block of 4 KiB it sees any one, two or three flipped bits and any burst of up to 32 bits; of
other damage one case in 2^32 escapes. As the sums are not on the drive, lost, stale and misplaced blocks are seen too.
"""

import ctypes
import threading
import zlib

import numpy as np

from hillinfer import native

BLOCK = 4096


class Checksums:
    """Pieces are whole blocks: byte offsets in the file, addresses in memory and lengths, each int64 (m,)."""

    def __init__(self):
        self.sums = np.zeros(0, np.uint32)  # block -> its sum; 0 where it was never written
        self._lock = threading.Lock()

    def note(self, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> None:
        """These pieces are about to be written."""
        with self._lock:  # growing replaces the table
            self._grow(offsets, lengths)
            run(self.sums, True, offsets, addresses, lengths)

    def check(self, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int | None:
        """The offset of the first block read that is not what was written there; None if all are."""
        bad = run(self.covering(offsets, lengths), False, offsets, addresses, lengths)
        return None if bad < 0 else bad

    def forget(self) -> None:
        """Nothing is known of any block: they were given back."""
        with self._lock:
            self.sums = np.zeros(0, np.uint32)

    def covering(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The table, for comparing these pieces; it may be replaced by a longer one at any time."""
        with self._lock:
            return self._grow(offsets, lengths)

    def _grow(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The table, made to cover these pieces."""
        need = int((offsets + lengths).max(initial=0)) // BLOCK
        if need > len(self.sums):
            self.sums = np.append(self.sums, np.zeros(need + need // 2 - len(self.sums), np.uint32))
        return self.sums


def run(sums: np.ndarray, write: bool, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int:
    """The kernel, or the reference without one; they agree to the bit. -1, or the offset of a block that differs."""
    if not native.available():
        return reference(sums, write, offsets, addresses, lengths)
    return native.checksums(write, offsets, addresses, lengths, sums)


def reference(sums: np.ndarray, write: bool, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int:
    """What `native.checksums` computes, by zlib."""
    for offset, address, length in zip(offsets.tolist(), addresses.tolist(), lengths.tolist(), strict=True):
        memory = memory_at(address, length)
        for at in range(0, length, BLOCK):
            block = (offset + at) // BLOCK
            if write or sums[block]:
                found = zlib.crc32(memory[at : at + BLOCK]) or 1
                if write:
                    sums[block] = found
                elif sums[block] != found:
                    return offset + at
    return -1


def memory_at(address: int, length: int) -> memoryview:
    """Bytes at an address, without a hold on them."""
    return memoryview((ctypes.c_uint8 * length).from_address(address)).cast("B")
