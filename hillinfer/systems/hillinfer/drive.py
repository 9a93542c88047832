"""A computational drive: it scores keys in place (HillInfer HIE and CEC), or attends to them (InstAttention).

The host scores its hot pool and the drive its cold one, concurrently. The drive streams score blocks
`<positions, scores>`, which the host merges while the next block is scored; the selected records are fetched
afterwards. `EmulatedDrive` scores on this machine, `xrt.XrtDrive` on a SmartSSD; each has a thread of its own
(`worker`).
"""

import weakref
from pathlib import Path

import numpy as np

from hillinfer import native
from hillinfer.systems.hillinfer.codes_memory import CodeMemory
from hillinfer.systems.hillinfer.protocol import Emulation, Shape, Work
from hillinfer.systems.hillinfer.worker import Command, Memory, Worker


class ComputationalDrive:
    """Commands run in order on the drive's thread. Commands without a result return at once; after one fails, every
    later call raises DriveError. Invalid arguments are an immediate ValueError. Any thread may call, but a stream has
    one writer.

    direct   True if the drive's file bypasses the page cache
    close    shut down; also runs at collection and at exit. Does nothing in a forked process
    """

    def __init__(self, folder: Path, shape: Shape, settings: Emulation, memory: Memory):
        self._worker = worker = Worker(folder, shape, settings, memory)
        self.shape, self.direct = shape, worker.file.direct
        self._lengths = [0] * shape.streams
        self.close = weakref.finalize(self, worker.close)

    def write(self, stream: int, start: int, records: np.ndarray, codes: np.ndarray) -> None:
        """Append tokens start.. (start is the stream's length): records (n, record_bytes) uint8, key codes (Hkv, n, D)
        int8. New tokens are hot until `hold` marks them cold: the newest are in the window. Blocks while the queue is
        full.
        """
        shape, n = self.shape, len(records)
        _check("records", records, (n, shape.record_bytes), np.uint8)
        _check("codes", codes, (shape.kv_heads, n, shape.head_dim), np.int8)
        if start != self._lengths[stream]:
            raise ValueError(f"stream {stream} holds {self._lengths[stream]} tokens: {start} is not the next")
        step = self._worker.chunk
        for at in range(0, n, step):
            part = records[at : at + step].copy(), codes[:, at : at + step].copy()
            self._worker.submit("write", stream, start + n, *part, nbytes=part[0].nbytes + part[1].nbytes)
            self._lengths[stream] += len(part[0])

    def rescale(self, stream: int, doublings: np.ndarray) -> None:
        """Rescale a stream's codes to rint(codes / 2**doublings), as `KeyCodes.append` does when scales grow; doublings
        (Hkv, D) uint8.
        """
        _check("doublings", doublings, (self.shape.kv_heads, self.shape.head_dim), np.uint8)
        self._worker.submit("rescale", stream, doublings.copy())

    def hold(self, stream: int, positions: np.ndarray, hot: bool) -> None:
        """Mark tokens as hot (in the host's pool: the drive does not score them) or cold."""
        self._worker.submit("hold", stream, self._positions(stream, positions), hot)

    def begin_evaluate(self, stream: int, query: np.ndarray, block: int = 1024) -> Command:
        """Start scoring the stream's cold tokens, `block` at a time in ascending order, and return at once. Iterate
        over the result for its ScoreBlocks.

        query (Hkv, G, D) int8 has the scales folded in (`KeyCodes.query`). Scores equal `head_scores_reference` to the
        bit; there is no softmax and no scaling (CEC). Later calls of `hold` and `write` do not change the result.
        """
        _check("query", query, (self.shape.kv_heads, max(1, query.shape[1]), self.shape.head_dim), np.int8)
        if block < 1:
            raise ValueError(f"a score block needs at least one token, not {block}")
        return self._worker.submit("evaluate", stream, query.copy(), block)

    def begin_fetch(self, stream: int, positions: np.ndarray) -> Command:
        """Start reading the records of sorted positions (k,), hot or cold. The result is (k, record_bytes) uint8."""
        return self._worker.submit("fetch", stream, self._positions(stream, positions))

    def fetch(self, stream: int, positions: np.ndarray) -> np.ndarray:
        """Records of sorted positions (k,): (k, record_bytes) uint8."""
        return self.begin_fetch(stream, positions).result()

    def begin_attend(
        self, stream: int, query: np.ndarray, runs: np.ndarray, dtype: str, softcap: float = 0.0
    ) -> Command:
        """Start attending to the tokens in runs (r, 2) of [start, end), with a scaled query (Hkv, G, D) float32, over
        records of this dtype (float32, float16 or bfloat16). The result is the output (Hkv, G, D) and the logsumexp
        (Hkv, G), both float32 tensors.
        """
        runs, n = np.array(runs, np.int64).reshape(-1, 2), self._lengths[stream]
        if dtype not in native.DTYPES or (len(runs) and not 0 <= runs.min() <= runs.max() <= n):
            raise ValueError(f"runs must be within [0, {n}), and {dtype} one of {', '.join(native.DTYPES)}")
        return self._worker.submit("attend", stream, np.array(query, np.float32), runs, dtype, softcap)

    def truncate(self, stream: int, n: int) -> None:
        """Discard all tokens from n on."""
        if n < 0:
            raise ValueError(f"cannot truncate to {n} tokens")
        self._worker.submit("truncate", stream, n)
        self._lengths[stream] = min(n, self._lengths[stream])

    def report(self) -> dict[str, Work]:
        """Total work by kind: write, rescale, evaluate, attend, fetch. Waits for all commands."""
        return self._worker.submit("report").result()

    def _positions(self, stream: int, positions: np.ndarray) -> np.ndarray:
        """A checked copy."""
        positions, n = np.array(positions, np.int64), self._lengths[stream]
        if len(positions) and (positions[0] < 0 or positions[-1] >= n or (np.diff(positions) <= 0).any()):
            raise ValueError(f"positions must be sorted, distinct and below {n}, the length of stream {stream}")
        return positions


def _check(name: str, array: np.ndarray, shape: tuple, dtype: type) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, not {array.dtype} {array.shape}")


class EmulatedDrive(ComputationalDrive):
    """A computational drive in software: memory, file and one core of this machine."""

    def __init__(self, folder: Path, shape: Shape, settings: Emulation | None = None):
        settings = settings or Emulation()
        sizes = settings.dram_bytes, settings.page_bytes
        super().__init__(folder, shape, settings, lambda file: CodeMemory(file, shape, *sizes))
