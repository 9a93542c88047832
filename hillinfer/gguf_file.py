"""The header of a GGUF file: what it holds, and whether this file can be loaded, before anything is read from it.

    "GGUF" version tensors keys | key type value ... | name dimensions type offset ... | padding | tensors

Integers are little-endian, of 32 bits (version, types, number of dimensions) or 64.
"""

import mmap
import struct
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import NamedTuple

from hillinfer.errors import UsageError

STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
VERSIONS, MOST_DIMENSIONS, ALIGNMENT = (2, 3), 4, 32
PACKAGES = ("gguf", "accelerate")
AGAIN = "download it again"


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # fastest-moving dimension first
    kind: int  # ggml's number of its type
    offset: int  # bytes, from the first tensor


class Header(NamedTuple):
    keys: dict[str, str | float]  # an array's value is its length
    tensors: list[Tensor]
    end: int  # bytes before the first tensor


def check(path: Path) -> None:
    """UsageError, with the fix, for a file that cannot be loaded as a text model, or if a package for it is missing."""
    if not all(map(find_spec, PACKAGES)):
        raise UsageError(f"{path.name} needs {' and '.join(PACKAGES)}: pip install 'hillinfer[gguf]'")
    header = read(path)
    if header.keys.get("split.count", 1) not in (0, 1):
        raise UsageError(f"{path} is one part of a model; join the parts with llama-gguf-split --merge")
    if not header.keys.get("tokenizer.ggml.tokens"):
        raise UsageError(f"{path} has no tokenizer; give the .gguf file of a complete text model")
    if _scales_positions(header):
        raise UsageError(
            f"{path} scales its positions (RoPE), which transformers does not read from GGUF, so that long texts would "
            "go wrong; give the folder or hub id of the original model"
        )
    end = max((header.end + tensor.offset + _nbytes(tensor, path) for tensor in header.tensors), default=0)
    if end > (size := path.stat().st_size):
        raise UsageError(f"{path} is cut short, {size:,} of {end:,} bytes: {AGAIN}")


def _scales_positions(header: Header) -> bool:
    """True for Llama 3.1's factors, YaRN and the like; transformers reads those of gpt-oss only."""
    kind = header.keys.get("general.architecture")
    named = header.keys.get(f"{kind}.rope.scaling.type", "none") != "none" and kind != "gpt-oss"
    return named or any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in header.tensors)


def read(path: Path) -> Header:
    """The header. UsageError if the file is no GGUF file, is damaged, or is of another version."""
    try:
        with path.open("rb") as file:
            if (start := file.read(4)) == b"GGUF":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _Reader(data).header()
    except (struct.error, ValueError, TypeError, ArithmeticError) as error:
        raise UsageError(f"{path} is damaged: its header cannot be read ({error}); {AGAIN}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); name a readable .gguf file") from None
    raise UsageError(f"{path} is no GGUF file (it begins with {start!r}); give a .gguf file or a folder")


class _Reader:
    """Reads one value after the other. `struct.error` or `ValueError` where the file ends or makes no sense."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def header(self) -> Header:
        if (version := self.number("<I")) not in VERSIONS:
            raise ValueError(f"version {version}")
        tensors, keys = self.count(), self.count()
        values = {self.text(): self.value(self.number("<I")) for _ in range(keys)}
        found = [self.tensor() for _ in range(tensors)]
        alignment = values.get("general.alignment", ALIGNMENT)
        return Header(values, found, -(-self.at // alignment) * alignment)

    def number(self, kind: str) -> float:
        (value,) = struct.unpack_from(kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def count(self) -> int:
        """Of items, or of bytes. One that the rest of the file cannot hold is refused: it would take forever."""
        if (count := self.number("<Q")) > len(self.data) - self.at:
            raise ValueError(f"{count:,} items")
        return count

    def text(self) -> str:
        size = self.count()
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind: int) -> str | float:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(self.scalar(kind))
        kind, count = self.number("<I"), self.count()
        if kind == STRING:
            for _ in range(count):
                size = self.count()
                self.at += size
        else:
            self.at += count * struct.calcsize(self.scalar(kind))
        return count

    def scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ValueError(f"a value of type {kind}")
        return SCALARS[kind]

    def tensor(self) -> Tensor:
        name, dimensions = self.text(), self.number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name} of {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        return Tensor(name, shape, self.number("<I"), self.number("<Q"))


def _nbytes(tensor: Tensor, path: Path) -> int:
    """Bytes of a tensor in the file. UsageError if its quantisation cannot be unpacked."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(tensor.kind)
        values, nbytes = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except (KeyError, NotImplementedError, ValueError):
        name = kind.name if tensor.kind in set(GGMLQuantizationType) else f"number {tensor.kind}"
        raise UsageError(
            f"{tensor.name} in {path} is of quantisation {name}, which the package gguf cannot unpack; "
            "give a file of another one, such as Q4_K_M or Q8_0"
        ) from None
    return -(-prod(tensor.shape) // values) * nbytes
