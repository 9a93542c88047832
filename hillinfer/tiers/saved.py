"""A document's KV in one file: written as it is read, replaced as a whole, checked as it is loaded.

The file is in the safetensors format, so that any tool can look at it and a parser that many rely on reads its header.
Each layer is one tensor (B, n, 2, Hkv, D); the last tensor, `crc32`, has a checksum of each part of each layer.
"""

import fcntl
import json
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

VERSION = "1"
PART = 1024  # tokens under one checksum
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class SavedError(ValueError):
    """The file is no whole session, or not one for this model. The message is one line and names the file."""


def save(path: Path, layers: Iterable[Iterable[torch.Tensor]], shape: tuple[int, ...], dtype, facts: dict) -> None:
    """Write atomically: after a crash there is the file of before, or none.

    layers  for each layer its records in order, (B, m, 2, Hkv, D) at a time
    shape   (layers, B, n, 2, Hkv, D)
    facts   whatever else should be known of it, for `Saved.facts`
    """
    path = check_target(path)
    count, batch, n = shape[:3]
    parts = -(-n // PART)
    own, nbytes = list(shape[1:]), batch * n * 2 * shape[4] * shape[5] * dtype.itemsize
    header = {
        f"layer.{i}": {"dtype": NAMES[dtype], "shape": own, "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i in range(count)
    }
    end = count * nbytes
    header["crc32"] = {"dtype": "I64", "shape": [count, parts], "data_offsets": [end, end + count * parts * 8]}
    header["__metadata__"] = {"hillinfer": VERSION, "facts": json.dumps(facts)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    reclaim(path)
    fd, scratch = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # held while it is written: `reclaim` tells an orphan by its being free
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            sums = torch.zeros(count, parts, dtype=torch.int64)
            row = nbytes // batch
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
            file.seek(start + end)
            file.write(_bytes(sums))
            file.flush()
            os.fsync(file.fileno())
            Path(scratch).replace(path)
        _sync_folder(path.parent)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


class Saved:
    """A saved file, opened for reading; several processes may."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path).expanduser()
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise SavedError(f"{self.path} is no plain file; name the file that a session was saved to")
            self.file = safe_open(self.path, "pt")
            metadata = self.file.metadata() or {}
            names = set(self.file.keys())
        except (OSError, SafetensorError) as error:
            raise SavedError(f"{self.path} is no whole session ({error}); save it anew") from None
        if metadata.get("hillinfer") != VERSION:
            found = metadata.get("hillinfer", "another tool's")
            raise SavedError(f"{self.path} has format {found}, not {VERSION}; save it anew with this version")
        try:
            self.facts = json.loads(metadata["facts"])
            if not isinstance(self.facts, dict):
                raise TypeError("facts are no table")
            self.layers = len(names) - 1
            first = self.file.get_slice("layer.0")
            self.shape, self.dtype = tuple(first.get_shape()), DTYPES[first.get_dtype()]
            self.sums = self.file.get_tensor("crc32")
            others = (self.file.get_slice(f"layer.{i}") for i in range(1, self.layers))
            same = all((tuple(s.get_shape()), DTYPES[s.get_dtype()]) == (self.shape, self.dtype) for s in others)
            if not same or len(self.shape) != 5 or 0 in self.shape:
                raise ValueError("layers differ")
            if self.sums.shape != (self.layers, -(-self.shape[1] // PART)):
                raise ValueError("checksums are missing")
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise SavedError(f"{self.path} is no session of this form ({error}); save it anew") from None

    @property
    def n(self) -> int:
        """Tokens of each sequence."""
        return self.shape[1]

    def read(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Records (B, end - start, 2, Hkv, D), whose checksums were right."""
        whole = self.file.get_slice(f"layer.{layer}")
        out = torch.empty((self.shape[0], end - start, *self.shape[2:]), dtype=self.dtype)
        for number in range(start // PART, -(-end // PART)):
            first, last = number * PART, min((number + 1) * PART, self.n)
            part = whole[:, first:last]
            if _sum(part) != int(self.sums[layer, number]):
                raise SavedError(
                    f"{self.path} is damaged: layer {layer}, tokens {first} to {last - 1} differ from what was saved"
                )
            out[:, max(0, first - start) : last - start] = part[:, max(0, start - first) : end - first]
        return out


def check_target(path: Path) -> Path:
    """Where a session may be saved: a new name, or over a session; never through a link, nor over anything else."""
    path = Path(path).expanduser().absolute()
    if not path.parent.is_dir():
        raise SavedError(f"{path.parent} is no folder; make it first, or name another place for the session")
    if path.is_symlink():
        raise SavedError(f"{path} is a link; name the file itself")
    if path.exists():
        Saved(path)  # refuses what is no session: nothing of the user's is overwritten
    return path


def reclaim(path: Path) -> list[Path]:
    """Remove what saves to this path that were killed have left behind; returns it. Saves under way are left alone."""
    gone = []
    for scratch in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}-\w{{8}}\.part", scratch.name) and not scratch.is_symlink():
            try:
                with scratch.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    scratch.unlink()
            except OSError:
                continue
            gone.append(scratch)
    return gone


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
    return memoryview(records.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy())


def _sum(part: torch.Tensor) -> int:
    return zlib.crc32(_bytes(part))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
