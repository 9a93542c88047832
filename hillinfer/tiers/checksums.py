"""A CRC-32 of every 4 KiB block of a drive's file, kept in host memory: 4 bytes a block. numpy only.

In a block of 4 KiB a CRC-32 detects any one, two or three flipped bits and any burst of up to 32 bits; other damage
escapes once in 2^32. As the sums are not on the drive, lost, stale and misplaced blocks are detected too.
"""

import ctypes
import errno
import threading
import zlib

import numpy as np

from hillinfer import native

BLOCK = 4096  # bytes; O_DIRECT offsets, lengths and buffers are multiples of it


class Checksums:
    """Pieces are whole blocks: byte offsets in the file, addresses in memory and lengths, each int64 (m,)."""

    def __init__(self):
        self.sums = np.zeros(0, np.uint32)  # block -> CRC-32; 0 where nothing was written
        self._lock = threading.Lock()

    def note(self, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> None:
        """Store the checksums of pieces that are about to be written."""
        with self._lock:  # growing replaces the table
            run(self._grow(offsets, lengths), True, offsets, addresses, lengths)

    def forget(self) -> None:
        """Drop all checksums: the blocks were freed."""
        with self._lock:
            self.sums = np.zeros(0, np.uint32)

    def covering(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """A table that covers these pieces, to compare them with. A longer one may replace it at any time."""
        with self._lock:
            return self._grow(offsets, lengths)

    def _grow(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        need = int((offsets + lengths).max(initial=0)) // BLOCK
        if need > len(self.sums):
            self.sums = np.append(self.sums, np.zeros(need + need // 2 - len(self.sums), np.uint32))
        return self.sums


def compare(sums: np.ndarray, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> None:
    """OSError (EBADMSG), with the block's `offset`, if a piece read differs from what was written."""
    bad = run(sums, False, offsets, addresses, lengths)
    if bad >= 0:
        error = OSError(errno.EBADMSG, "damaged")
        error.offset = bad
        raise error


def run(sums: np.ndarray, write: bool, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int:
    """Store checksums in `sums`, or compare with it: -1, or the offset of the first block that differs."""
    if not native.available():
        return reference(sums, write, offsets, addresses, lengths)
    return native.checksums(write, offsets, addresses, lengths, sums)


def reference(sums: np.ndarray, write: bool, offsets: np.ndarray, addresses: np.ndarray, lengths: np.ndarray) -> int:
    """`run` by zlib; equal to the kernel to the bit."""
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
    """Bytes at an address. The caller keeps the memory alive."""
    return memoryview((ctypes.c_uint8 * length).from_address(address)).cast("B")
