"""Cost of checksums: alternating reads of scattered records from files with and without them.

python -m benchmarks.checksum_cost --drive FOLDER
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hillinfer import native
from hillinfer.tiers.record_file import RecordFile

RECORD, TOKENS = 4096, 16_384  # Llama-3-8B's record in bf16


@dataclass(frozen=True)
class Cost:
    """Median seconds of a read with and without checksums."""

    share: float  # of the records, random
    on: float
    off: float
    read: int  # bytes

    @property
    def ratio(self) -> float:
        return self.on / self.off

    def __str__(self) -> str:
        rates = [self.read / seconds / 1e9 for seconds in (self.on, self.off)]
        return f"{self.share:.0%} of {TOKENS:,} records: {rates[0]:.2f} GB/s with, {rates[1]:.2f} without"


def kernel() -> float:
    """Bytes per second that one core checks in memory."""
    buffer, sums = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8), np.zeros(16_384, np.uint32)
    where = np.array([0]), np.array([native.pointer(buffer)]), np.array([len(buffer)])
    times = []
    for write in (True, *[False] * 8):
        start = time.perf_counter()
        assert native.checksums(write, *where, sums) == -1
        times.append(time.perf_counter() - start)
    return len(buffer) / statistics.median(times[1:])


def costs(folder: Path, rounds: int = 20, shares=(0.01, 0.1, 0.5), direct: bool = True) -> list[Cost]:
    rng, found = np.random.default_rng(0), []
    files = [RecordFile(folder, RECORD, 1, checksums=on, direct=direct) for on in (True, False)]
    try:
        for file in files:
            file.write(0, 0, rng.integers(0, 256, (TOKENS, RECORD), dtype=np.uint8))
        for share in shares:
            positions = np.flatnonzero(rng.random(TOKENS) < share)
            times, nbytes = ([], []), 0
            for number in range(rounds + 1):
                for file, seconds in list(zip(files, times, strict=True))[:: 1 if number % 2 else -1]:
                    start = time.perf_counter()
                    nbytes = file.read_in_place(0, positions)[2]
                    seconds.append(time.perf_counter() - start)
            found.append(Cost(share, *(statistics.median(seconds[1:]) for seconds in times), nbytes))
    finally:
        for file in files:
            file.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drive", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    print(f"{'the kernel' if native.available() else 'zlib'}: {kernel() / 1e9:.1f} GB/s from memory, one core")
    for direct in (True, False):
        print("O_DIRECT" if direct else "page cache")
        for cost in costs(args.drive, direct=direct):
            print(f"  {cost}; {cost.ratio:.3f}x the time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
