"""The fence around the C kernels: takes the address of an array once its type, size and place are known to fit.

A wrong call is a TypeError, ValueError or IndexError before a kernel runs. A check costs tenths of a microsecond:
shapes are compared here, and the contents of positions, slots and addresses in C, before any is followed. What lies at
a record's address is beyond both: its owner vouches for it (`tiers.records`).
"""

import ctypes

import numpy as np

SIZES = {"bool": 1, "int8": 1, "int32": 4, "int64": 8, "uint32": 4, "uint64": 8, "float32": 4}  # bytes of an element
MAX_CODED = 1040  # largest head dimension of key codes, as in common.h


class _Names(dict):
    """Names of torch's and numpy's dtypes, kept because `str` takes longer than a check may."""

    def __missing__(self, dtype) -> str:
        self[dtype] = str(dtype).removeprefix("torch.")
        return self[dtype]


NAMES = _Names()
_addressof, _from_buffer = ctypes.addressof, ctypes.c_char.from_buffer  # three times as fast as numpy's own attribute


def pointer(array) -> int | None:
    """Address of the first element of a tensor or array; None for None."""
    if not isinstance(array, np.ndarray):
        return None if array is None else array.data_ptr()
    try:
        return _addressof(_from_buffer(array))
    except (TypeError, ValueError):  # empty, read-only or not contiguous
        return array.__array_interface__["data"][0]


def address(array, dtype: str, size: int, write: bool = False) -> int:
    """Address of `size` elements that are contiguous in host memory, writable if `write`.

    TypeError for another dtype or no array at all, ValueError for another size or layout.
    """
    at = held = -1
    try:
        if isinstance(array, np.ndarray):
            try:
                at = _addressof(_from_buffer(array))  # takes only what is contiguous and writable
            except (TypeError, ValueError):
                if array.flags.c_contiguous and (array.flags.writeable or not write):
                    at = array.__array_interface__["data"][0]
            held = array.size
        elif array.is_cpu and array.is_contiguous():
            at, held = array.data_ptr(), array.numel()
        if at >= 0 and held == size and NAMES[array.dtype] == dtype and not at % SIZES.get(dtype, 1):
            return at
    except (AttributeError, RuntimeError):
        raise TypeError(f"a tensor or array of {dtype} in host memory is needed, not {type(array).__name__}") from None
    if NAMES[array.dtype] != dtype:
        raise TypeError(f"{dtype} is needed, not {array.dtype}")
    kind = "contiguous and writable" if write else "contiguous"
    raise ValueError(f"{size} {kind} elements in host memory are needed, not {tuple(array.shape)}")


def integers(array, n: int | None = None) -> np.ndarray:
    """Whole numbers as contiguous int64 (n,). TypeError for floats and masks, ValueError for another shape."""
    array = np.asarray(array)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"whole numbers are needed, not {array.dtype}")
    if array.ndim != 1 or n not in (None, len(array)):
        raise ValueError(f"one row of {'whole' if n is None else n} numbers is needed, not {array.shape}")
    return np.ascontiguousarray(array, np.int64)


def code_rows(stored, lead: list[int], dim: int, bits: int) -> tuple[tuple[int, ...], int]:
    """Strides in bytes and tokens n of codes int8 (*lead, n, D*bits/8), whose rows are contiguous in host memory."""
    plain, (row, odd) = isinstance(stored, np.ndarray), divmod(dim * bits, 8)
    strides, (*dims, n, width) = stored.strides if plain else stored.stride(), stored.shape
    if bits not in (2, 4, 8) or odd or not 0 < dim <= MAX_CODED or not (plain or stored.is_cpu):
        raise ValueError(f"no codes of {dim} channels in {bits} bits, or not in host memory")
    if NAMES[stored.dtype] != "int8" or dims != lead or width != row or strides[-2:] != (row, 1):
        raise ValueError(
            f"codes must be contiguous rows of {row} bytes, int8 ({lead}, n, {row}), "
            f"not {stored.dtype} {tuple(stored.shape)} with strides {strides}"
        )
    return strides[:-2], n
