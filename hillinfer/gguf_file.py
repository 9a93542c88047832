"""A GGUF file: its header, whether it can be loaded, before anything else is read from it, and reading it fast.

    "GGUF" version tensors keys | key type value ... | name dimensions type offset ... | padding | tensors

Integers are little-endian, of 32 bits (version, types, number of dimensions) or 64.
"""

import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import count
from math import prod
from pathlib import Path
from typing import NamedTuple

from hillinfer.errors import UsageError

STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
VERSIONS, MOST_DIMENSIONS, MOST_ITEMS, ALIGNMENT = (2, 3), 4, 1 << 22, 32
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


def check(path: Path) -> Header:
    """The header of a text model's file. UsageError, with the fix, if it cannot be loaded or a package is missing."""
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
    return header


@contextmanager
def read_fast(tensors: int, tell: Callable[[str, float], None] | None) -> Iterator[None]:
    """While this is open, transformers loads checked GGUF files without most of its overhead, with equal results.

    The package gguf creates NumPy views, in 20 µs, for each of the 450,000 items of a tokenizer's arrays, and
    transformers has it build the same table of names once per module.

    tensors  in the file
    tell     is given what is done and the share of it, 0 to 1, before each tensor
    """
    import gguf
    from gguf import gguf_reader, quants, tensor_mapping

    class Reader(gguf_reader.GGUFReader):
        def _get_field_parts(self, at, kind):
            if kind != ARRAY:
                return super()._get_field_parts(at, kind)
            reader = _Reader(memoryview(self.data), at)
            of, items = reader.array()
            return reader.at - at, items, list(range(len(items))), [gguf.GGUFValueType(kind) for kind in (ARRAY, of)]

    def dequantize(*tensor):
        if tell:
            tell(f"unpacking tensor {(n := next(numbers)):,} of {tensors:,}", n / tensors)
        return quants.dequantize(*tensor)

    numbers, table = count(1), tensor_mapping.get_tensor_name_map
    vars(gguf).update(GGUFReader=Reader, dequantize=dequantize, get_tensor_name_map=cache(table))
    try:
        yield
    finally:
        own = dict(GGUFReader=gguf_reader.GGUFReader, dequantize=quants.dequantize, get_tensor_name_map=table)
        vars(gguf).update(own)


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
    except (struct.error, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise UsageError(f"{path} is damaged: its header cannot be read ({error}); {AGAIN}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); name a readable .gguf file") from None
    raise UsageError(f"{path} is no GGUF file (it begins with {start!r}); give a .gguf file or a folder")


class _Reader:
    """Reads one value after the other. `struct.error` or `ValueError` where the file ends or makes no sense."""

    def __init__(self, data: mmap.mmap | memoryview, at: int = 4):
        self.data, self.at = data, at

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

    def count(self, most: int = 1 << 63) -> int:
        """Of items, or of bytes. One that the rest of the file cannot hold is refused: it would take forever."""
        if (count := self.number("<Q")) > min(most, len(self.data) - self.at):
            raise ValueError(f"{count:,} items")
        return count

    def raw(self) -> bytes:
        size = self.count()
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def text(self) -> str:
        return self.raw().decode("utf-8")

    def value(self, kind: int) -> str | float:
        if kind == STRING:
            return self.text()
        return len(self.array()[1]) if kind == ARRAY else self.number(SCALARS[kind])

    def array(self) -> tuple[int, list]:
        """The type of an array's items, and these: strings as bytes, numbers as tuples of one."""
        kind, count = self.number("<I"), self.count(MOST_ITEMS)
        if kind == STRING:
            return kind, [self.raw() for _ in range(count)]
        size = count * struct.calcsize(SCALARS[kind])
        self.at += size
        return kind, list(struct.iter_unpack(SCALARS[kind], self.data[self.at - size : self.at]))

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
