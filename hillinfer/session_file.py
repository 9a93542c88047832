"""A document's KV in one file: written as it is read, replaced as a whole, checked as it is loaded.

The file is in the safetensors format, so that any tool can look at it. Each layer is one tensor (B, n, 2, Hkv, D); the
last tensor, `crc32`, has a checksum of each part of each layer, and the header has one of the facts. It is read by
plain reads and not mapped: a file that somebody cuts short meanwhile is then an error and not a signal.
"""

import json
import math
import os
import weakref
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from hillinfer import files

VERSION = "2"  # 1 had no checksum of the facts
PART = 1024  # tokens under one checksum
LONGEST = 1 << 28  # bytes of a header that is still read
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class SavedError(ValueError):
    """The file is no whole session, or not one for this model. The message is one line and names the file."""


def save(path: Path, layers: Iterable[Iterable[torch.Tensor]], shape: tuple[int, ...], dtype, facts: dict) -> None:
    """Write atomically: after a crash there is the file of before, or none.

    layers  for each layer its records in order, (B, m, 2, Hkv, D) at a time
    shape   (layers, B, n, 2, Hkv, D)
    facts   whatever else should be known of it, for `Saved.facts`
    """
    path, count, batch = check_target(path), shape[0], shape[1]
    nbytes = math.prod(shape[1:]) * dtype.itemsize
    text = json.dumps(_header(shape, NAMES[dtype], facts)).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(path, 0o600) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start, row = file.tell(), nbytes // batch
        sums = torch.zeros(count, -(-shape[2] // PART), dtype=torch.int64)
        for index, layer in enumerate(layers):
            at = 0
            for number, part in enumerate(_even(layer, PART)):
                sums[index, number] = _sum(part)
                for sequence, records in enumerate(part):
                    file.seek(start + index * nbytes + sequence * row + at)
                    file.write(_bytes(records))
                at += _bytes(part[0]).nbytes
            if at != row:
                raise ValueError(f"layer {index} has {at} bytes for each sequence and not {row}")
        file.seek(start + count * nbytes)
        file.write(_bytes(sums))


def _header(shape: tuple[int, ...], dtype: str, facts: dict) -> dict:
    """What a file of this shape begins with."""
    count, own, parts = shape[0], list(shape[1:]), -(-shape[2] // PART)
    nbytes = math.prod(own) * DTYPES[dtype].itemsize
    end, text = count * nbytes, json.dumps(facts)
    return {
        **{
            f"layer.{i}": {"dtype": dtype, "shape": own, "data_offsets": [i * nbytes, (i + 1) * nbytes]}
            for i in range(count)
        },
        "crc32": {"dtype": "I64", "shape": [count, parts], "data_offsets": [end, end + count * parts * 8]},
        "__metadata__": {"hillinfer": VERSION, "facts": text, "facts_crc32": str(zlib.crc32(text.encode()))},
    }


class Saved:
    """A saved file, opened for reading; several processes may. SavedError for what is none, and for damage when it is
    read.
    """

    def __init__(self, path: Path):
        self.path = Path(path).expanduser()
        try:
            files.reclaim(self.path.parent.resolve(), f".{self.path.name}-")
            self.fd = files.open_plain(self.path)
            self.close = weakref.finalize(self, os.close, self.fd)
            size = os.fstat(self.fd).st_size
            self.start = 8 + int.from_bytes(os.pread(self.fd, 8, 0), "little")
            if not 8 < self.start <= min(size, LONGEST):
                raise ValueError("its head is cut off")
            header = json.loads(os.pread(self.fd, self.start - 8, 8))
            metadata = header.get("__metadata__") if isinstance(header, dict) else None
            if not isinstance(metadata, dict):
                raise ValueError("it is another tool's")
        except (OSError, ValueError, RecursionError) as error:
            raise SavedError(f"{self.path} is no whole session ({error}); save it anew") from None
        if metadata.get("hillinfer") != VERSION:
            found = metadata.get("hillinfer", "another tool's")
            raise SavedError(f"{self.path} has format {found}, not {VERSION}; save it anew with this version")
        try:
            self.facts = json.loads(metadata["facts"])
            self.shape, self.dtype = tuple(header["layer.0"]["shape"]), DTYPES[header["layer.0"]["dtype"]]
            self.layers = len(header) - 2
            if (
                len(self.shape) != 5
                or self.shape[2] != 2
                or not all(type(i) is int and 0 < i < 1 << 40 for i in self.shape)
            ):
                raise ValueError("layers have another shape")
            if header != _header((self.layers, *self.shape), NAMES[self.dtype], self.facts):
                raise ValueError("its parts do not fit together")
            if not isinstance(self.facts, dict):
                raise ValueError("facts are no table")
            self.row = math.prod(self.shape[1:]) * self.dtype.itemsize  # bytes of a sequence of a layer
            sums, end = header["crc32"]["shape"], header["crc32"]["data_offsets"][1]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise SavedError(f"{self.path} is no session of this form ({error}); save it anew") from None
        if size != self.start + end:
            raise SavedError(
                f"{self.path} is no whole session ({size:,} bytes, not {self.start + end:,}); save it anew"
            )
        self.sums = torch.empty(sums, dtype=torch.int64)
        self._fill(_bytes(self.sums), self.start + end - self.sums.nbytes)

    @property
    def n(self) -> int:
        """Tokens of each sequence."""
        return self.shape[1]

    def read(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Records (B, end - start, 2, Hkv, D), whose checksums were right."""
        first, last = start // PART * PART, min(-(-end // PART) * PART, self.n)
        out = torch.empty((self.shape[0], last - first, *self.shape[2:]), dtype=self.dtype)
        width = self.row // self.n
        for row, records in enumerate(out):
            at = self.start + (layer * self.shape[0] + row) * self.row + first * width
            self._fill(_bytes(records), at)
        for number in range(first // PART, -(-last // PART)):
            low, high = number * PART, min((number + 1) * PART, self.n)
            if _sum(out[:, low - first : high - first]) != int(self.sums[layer, number]):
                raise SavedError(
                    f"{self.path} is damaged: layer {layer}, tokens {low} to {high - 1} differ from what was saved"
                )
        return out[:, start - first : end - first]

    def _fill(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                n = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise SavedError(f"{self.path} cannot be read ({error.strerror}); save it anew") from None
            if not n:
                raise SavedError(f"{self.path} is no whole session: it was cut short; save it anew")
            done += n


def check_target(path: Path) -> Path:
    """Where a session may be saved: a new name, or over a session; never through a link, nor over anything else."""
    try:
        path = files.plain(path)
    except OSError as error:
        raise SavedError(str(error)) from None
    if not path.parent.is_dir():
        raise SavedError(f"{path.parent} is no folder; make it first, or name another place for the session")
    if path.exists():
        Saved(path).close()  # refuses what is no session: nothing of the user's is overwritten
    return path


def _even(parts: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """The same tokens, `size` at a time."""
    held = None
    for part in parts:
        held = part if held is None else torch.cat((held, part), 1)
        while held.shape[1] >= size:
            yield held[:, :size]
            held = held[:, size:]
    if held is not None and held.shape[1]:
        yield held


def _bytes(records: torch.Tensor) -> memoryview:
    """Their bytes; of a contiguous tensor in memory the very ones, not a copy."""
    return memoryview(records.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy())


def _sum(part: torch.Tensor) -> int:
    return zlib.crc32(_bytes(part))
