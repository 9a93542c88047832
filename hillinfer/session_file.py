"""A document's KV in one file: written as a stream, replaced atomically, verified on load.

The format is safetensors, readable by any tool. Each layer is one tensor (1, n, 2, Hkv, D); the last tensor, `crc32`,
holds a checksum per layer and part; the header holds one of the facts. Files are read, not memory-mapped, so that
truncating an open file raises an error instead of a signal.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from hillinfer import files, native
from hillinfer.errors import UsageError

VERSION = "3"  # 1 had no checksum of the facts, 2 another fingerprint of the model
PART = 1024  # tokens per checksum
MAX_HEADER = 1 << 28  # bytes
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def save(path: Path, layers: Iterable[Iterable[torch.Tensor]], shape: tuple[int, ...], dtype, facts: dict) -> None:
    """Write atomically: a crash leaves the previous file, or none.

    layers  the records of each layer in order, as tensors (1, m, 2, Hkv, D)
    shape   (layers, 1, n, 2, Hkv, D)
    facts   JSON values, returned as `Saved.facts`
    """
    path, count, nbytes = check_session(path), shape[0], math.prod(shape[1:]) * dtype.itemsize
    with files.replacing(path, 0o600) as file:
        file.write(head(shape, dtype, facts)[0])
        sums = torch.zeros(count, -(-shape[2] // PART), dtype=torch.int64, device="cpu")
        for index, layer in enumerate(layers):
            written = 0
            for number, part in enumerate(_rechunked(layer, PART)):
                sums[index, number] = crc32(as_bytes(part))
                written += file.write(as_bytes(part))
            if written != nbytes:
                raise ValueError(f"layer {index} has {written} bytes, not {nbytes}")
        file.write(as_bytes(sums))


def head(shape: tuple[int, ...], dtype: torch.dtype, facts: dict) -> tuple[bytes, int]:
    """What a file of this shape (layers, 1, n, 2, Hkv, D) begins with, and its size in bytes."""
    fields = _header(shape, dtype, facts)
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % native.BLOCK)  # records begin with a block, so that a drive can read them
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + fields["crc32"]["data_offsets"][1]


def _header(shape: tuple[int, ...], dtype: torch.dtype, facts: dict) -> dict:
    """The header of a file of this shape."""
    count, layer, parts = shape[0], list(shape[1:]), -(-shape[2] // PART)
    nbytes, text = math.prod(layer) * dtype.itemsize, json.dumps(facts)
    tensor, end = {"dtype": NAMES[dtype], "shape": layer}, count * nbytes
    return {f"layer.{i}": tensor | {"data_offsets": [i * nbytes, (i + 1) * nbytes]} for i in range(count)} | {
        "crc32": {"dtype": "I64", "shape": [count, parts], "data_offsets": [end, end + count * parts * 8]},
        "__metadata__": {"hillinfer": VERSION, "facts": text, "facts_crc32": str(zlib.crc32(text.encode()))},
    }


class Saved:
    """A session file opened for reading. Raises UsageError for any other file, and on reading damaged records."""

    def __init__(self, path: Path):
        self.path = Path(path).expanduser()
        try:
            self.file = os.fdopen(files.open_plain(self.path), "rb")
            self.close = self.file.close
            self._read_header()
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.path} is not a complete session ({error}); save it again") from None

    def _read_header(self) -> None:
        """Parse and verify the header: it must equal the header that `save` writes for these shapes and facts."""
        size = os.fstat(self.file.fileno()).st_size
        self.start = 8 + int.from_bytes(self.file.read(8), "little")
        if not 8 < self.start <= min(size, MAX_HEADER):
            raise ValueError("its header is cut off")
        header = json.loads(self.file.read(self.start - 8))
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or "hillinfer" not in metadata:
            raise ValueError("another tool wrote it")
        if metadata["hillinfer"] != VERSION:
            raise ValueError(f"it has format {metadata['hillinfer']}, not {VERSION}")
        self.facts = json.loads(metadata["facts"])
        self.layers, layer = len(header) - 2, header["layer.0"]
        self.shape, self.dtype = tuple(layer["shape"]), DTYPES[layer["dtype"]]  # (1, n, 2, Hkv, D)
        sizes = all(type(i) is int and 0 < i < 1 << 40 for i in self.shape)
        if len(self.shape) != 5 or self.shape[0] != 1 or self.shape[2] != 2 or not sizes:
            raise ValueError("its layers have another shape")
        self.n = self.shape[1]
        expected = _header((self.layers, *self.shape), self.dtype, self.facts)
        if not isinstance(self.facts, dict) or header != expected:
            raise ValueError("its header is inconsistent")
        end = self.start + expected["crc32"]["data_offsets"][1]
        if size != end:
            raise ValueError(f"{size:,} bytes, not {end:,}")
        self.sums = torch.empty(expected["crc32"]["shape"], dtype=torch.int64, device="cpu")
        self._fill(self.sums, end - self.sums.nbytes)

    def read(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Verified records (1, end - start, 2, Hkv, D)."""
        first, last = start // PART * PART, min(-(-end // PART) * PART, self.n)
        out = torch.empty((1, last - first, *self.shape[2:]), dtype=self.dtype, device="cpu")
        self.read_into(out, layer, first)
        return out[:, start - first : end - first]

    def read_into(self, out: torch.Tensor, layer: int, first: int = 0) -> None:
        """Verified records from token `first` on, with which a part begins, into out (1, m, 2, Hkv, D)."""
        self._fill(out, self.start + (layer * self.n + first) * math.prod(self.shape[2:]) * self.dtype.itemsize)
        for number, part in enumerate(out.split(PART, 1), first // PART):
            if crc32(as_bytes(part)) != self.sums[layer, number]:
                tokens = f"{number * PART} to {number * PART + part.shape[1] - 1}"
                raise UsageError(f"{self.path} is damaged: layer {layer}, tokens {tokens} differ from what was saved")

    def _fill(self, tensor: torch.Tensor, offset: int) -> None:
        try:
            self.file.seek(offset)
            n = self.file.readinto(as_bytes(tensor))
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read ({error.strerror}); save it again") from None
        if n < tensor.nbytes:
            raise UsageError(f"{self.path} is not a complete session: it was truncated; save it again")


def check_session(path: Path) -> Path:
    """The absolute path, if a session may be saved there: a new file or an existing session. UsageError otherwise."""
    path = files.plain(path)
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} does not exist; make it first, or name another place for the session")
    if path.exists():
        Saved(path).close()  # never overwrite anything but a session
    return path


def _rechunked(parts: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """The same tokens in parts of `size`, the last one shorter."""
    held = None
    for part in parts:
        held = part if held is None else torch.cat((held, part), 1)
        while held.shape[1] >= size:
            yield held[:, :size]
            held = held[:, size:]
    if held is not None and held.shape[1]:
        yield held


def crc32(data) -> int:
    """`zlib.crc32` of bytes in memory, by the kernel that verifies a drive's blocks where it is there."""
    view, head = memoryview(data).cast("B"), 0
    whole = len(view) // 64 * 64 if native.available() else 0
    if whole:
        head = native.library.hi_crc(native.library.isa, native.pointer(np.frombuffer(view, np.uint8)), whole)
    return zlib.crc32(view[whole:], head)


def as_bytes(records: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy if it is contiguous and in host memory."""
    return memoryview(records.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
