"""C kernels beside their torch and numpy references, which remain the definition. This package imports numpy only.

The functions take torch tensors or numpy arrays in host memory and release the GIL. Callers check `available()` and
otherwise use the reference.
"""

import ctypes
import threading

import numpy as np

from hillinfer.native.build import Unavailable, load

ISAS = ("generic", "neon", "avx2", "avx512-vnni")  # slowest first, as in common.h
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
MAX_DIM = 1024  # largest head dimension of `attend` and `bounds`, as in common.h
SPLIT = 1 << 20  # bytes of keys or records per thread; with fewer, another thread does not pay
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "hi_isas": (_I, []),
    "hi_score": (_I, [_I, _I, _P, _L, _P, _I, _I, _I, _P, _L, _P, _L, _I]),
    "hi_topk": (_L, [_I, _P, _L, _L, _P]),
    "hi_merge": (_L, [_I, _P, _L, _I, _L, _L, _P, _I]),
    "hi_attend": (_I, [_I, _I, _P, _P, _L, _L, _L, _P, _I, _I, _I, ctypes.c_float, ctypes.c_float, _P, _P, _I]),
    "hi_bounds": (_I, [_I, _P, _P, _P, _L, _P, _I, _I, _I, ctypes.c_float, _P, _P, _P, _I]),
    "hi_copy": (None, [_P, _P, _P, _L, _L, _I]),
    "hi_query": (None, [_P, _P, _I, _I, _I, _P]),
    "hi_read": (ctypes.c_uint64, [_I, _P, _L, _I]),
    "hi_ring_open": (_P, [_I, _I, _P]),
    "hi_ring_close": (None, [_P]),
    "hi_ring_run": (_I, [_P, _I, _I, _L, _P, _P, _P, _P, _P, _L, _I, _P, _L, _L]),
    "hi_ring_result": (_I, [_I, _I, _L, _P]),
    "hi_ring_in_flight": (_L, [_P]),
    "hi_nvme_entry": (None, [_P, _I, _I, _L, _L, _L, _L, _L]),
    "hi_checksums": (_L, [_I, _I, _L, _P, _P, _P, _P]),
    "hi_encode": (_I, [_I, _P, _L, _L, _L, _I, _I, _L, _I, _I, _P, _P, _L, _L, _L, _P]),
}


class _Library:
    """The compiled functions as attributes, loaded on first use, and the instruction set in use."""

    def __init__(self):
        self._lock, self.reason, self.isa, self.isas = threading.Lock(), None, 0, None

    def __getattr__(self, name: str):
        """Reached only for a function that is not loaded yet."""
        if name.startswith("hi_") and self.ready():
            return self.__dict__[name]
        raise Unavailable(self.reason or name)

    def ready(self) -> bool:
        with self._lock:
            if self.isas is None:
                self._load()
        return self.reason is None

    def _load(self) -> None:
        self.isas = ()
        try:
            library = load()
        except Unavailable as error:
            self.reason = str(error)
            return
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.isas = tuple(isa for isa in range(len(ISAS)) if library.hi_isas() >> isa & 1)
        self.isa = self.isas[-1]


library = _Library()


def available() -> bool:
    """Whether the kernels can be used here; the first call may compile them, which takes seconds."""
    return library.ready()


def why_not() -> str | None:
    """Why the kernels are unavailable, in one line with the fix, or None if they are available."""
    available()
    return library.reason


def isa() -> str:
    """The instruction set in use."""
    return ISAS[library.isa] if available() else "none"


def isas() -> list[str]:
    """Instruction sets of this machine, slowest first."""
    return [ISAS[i] for i in library.isas] if available() else []


def use_isa(name: str) -> None:
    """Switch to one of `isas()`, for tests and measurements."""
    library.isa = ISAS.index(name)


def read(words: np.ndarray, threads: int = 1) -> int:
    """The sum of uint64 words, computed at memory bandwidth."""
    return library.hi_read(library.isa, pointer(words), len(words), threads)


def score(query, stored, bits: int, positions: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """Scores of a quantised query int8 (Hkv, G, D) against codes (Hkv, n, D*bits/8), at all or at given positions (m,).

    Returns int32 (Hkv, n or m), the maximum over each group; defined by `evaluator.codes.group_scores_reference`.
    """
    heads, group, dim = query.shape
    row = dim * bits // 8
    strides, (_, n, width) = _strides(stored), stored.shape
    query = np.ascontiguousarray(query)
    if strides[1:] != (row, 1) or width != row:
        raise ValueError(f"codes of a head must be contiguous rows of {row} bytes, not have strides {strides}")
    if positions is not None:
        positions = np.ascontiguousarray(positions, np.int64)
        if len(positions) and not (positions.min() >= 0 and positions.max() < n):
            raise IndexError(f"positions must be in [0, {n})")
        n = len(positions)
    out = np.empty((heads, n), np.int32)
    shape = (heads, group, dim, pointer(positions), n, pointer(out), n, _share(heads * n * row, threads))
    _check(library.hi_score(library.isa, bits, pointer(stored), strides[0], pointer(query), *shape))
    return out


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """As `evaluator.topk.topk_reference`: positions of the k largest of int32 (n,), largest first."""
    scores, k = np.ascontiguousarray(scores), min(k, len(scores))
    out = np.empty(k, np.int32)
    _check(library.hi_topk(library.isa, pointer(scores), len(scores), k, pointer(out)))
    return out.astype(np.int64)


def merge_heads(scores: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
    """As `evaluator.topk.merge_heads_reference`: one ascending selection of k positions from int32 (Hkv, n)."""
    if scores.strides[1] != 4:
        scores = np.ascontiguousarray(scores)
    heads, n = scores.shape
    out = np.empty(min(k, n), np.int64)
    threads = _share(scores.nbytes, threads)
    shape = (scores.strides[0] // 4, heads, n, len(out), pointer(out), threads)
    _check(library.hi_merge(library.isa, pointer(scores), *shape))
    return out


def attend(
    query,
    rows: list,
    dtype: str,
    kv_heads: int,
    scale: float,
    out,
    lse,
    threads: int = 1,
    side: int | None = None,
    softcap: float = 0.0,
) -> None:
    """Attention of queries fp32 (B, H, D), each over the records K (Hkv, D), V (Hkv, D) of its row, into out fp32
    (B, H, D), and the logsumexp of the scaled logits into lse fp32 (B, H). All contiguous.

    rows  per query, record addresses int64 (n,), or (first address, stride in bytes, n) for evenly spaced records;
          the caller keeps the memory alive
    side  bytes from a record's keys to its values; None: the values follow the keys
    softcap  c > 0 turns each logit x into c * tanh(x / c)
    """
    heads, dim = query.shape[1:]
    width = 2 * kv_heads * dim * (4 if dtype == "float32" else 2)
    read, write, sums, kind = pointer(query), pointer(out), pointer(lse), DTYPES[dtype]
    for number, where in enumerate(rows):
        base, stride, n = where if isinstance(where, tuple) else (None, 0, len(where))
        addresses, at = None if base else pointer(where), number * heads * dim * 4
        records = addresses, base, stride, n, width // 2 if side is None else side
        shape = *records, read + at, kv_heads, heads // kv_heads, dim, scale, softcap
        shape = *shape, write + at, sums + number * heads * 4
        _check(library.hi_attend(library.isa, kind, *shape, _share(n * width, threads)))


def bounds(
    query, boxes: np.ndarray, scales: np.ndarray, leaf: np.ndarray, slack: float, floor=None, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """As `evaluator.boxes.bounds`, but for the order of summation: query fp32 (Hkv, G, D) against int8 boxes
    (Hkv, 2, D) and the scales of their pages, fp32 (Hkv, D), both given as addresses int64 (m,).

    leaf   bool (m,): boxes estimated with `slack`
    floor  fp32 (Hkv, G), the bound that some head must reach

    Returns the maximum over each group, fp32 (Hkv, m), and which boxes reach the floor, bool (m,).
    """
    heads, group, dim = query.shape
    query, floor = query.contiguous(), None if floor is None else floor.contiguous()
    best, reach = np.empty((heads, len(boxes)), np.float32), np.empty(len(boxes), bool)
    where = (pointer(boxes), pointer(scales), pointer(leaf), len(boxes), pointer(query), heads, group, dim, slack)
    threads = _share(len(boxes) * 2 * heads * dim, threads)
    _check(library.hi_bounds(library.isa, *where, pointer(floor), pointer(best), pointer(reach), threads))
    return best, reach


def copy(addresses: np.ndarray, out, slots: np.ndarray, threads: int = 1) -> None:
    """Copy the records at addresses int64 (k,) to out[slots]; slots (k,) are distinct, out (n, ...) is contiguous."""
    slots = np.ascontiguousarray(slots, np.int64)
    if len(slots) != len(addresses) or (len(slots) and not 0 <= slots.min() <= slots.max() < out.shape[0]):
        raise IndexError(f"{len(addresses)} records for {len(slots)} slots, which must be in [0, {out.shape[0]})")
    width = out.nbytes // max(1, out.shape[0])
    threads = _share(len(slots) * width, threads)
    library.hi_copy(pointer(addresses), pointer(out), pointer(slots), len(slots), width, threads)


def encode(keys, dtype: str, bits: int, scale, codes, at: int) -> np.ndarray:
    """Quantise keys (B, Hkv, n, D) into codes (B, Hkv, capacity, D*bits/8) from token `at` on, bit-identical to
    `evaluator.codes.KeyCodes` in torch. Doubles scale fp32 (B, Hkv, 1, D) where keys exceed it.

    Returns the doublings of each channel, uint8 (B, Hkv, D).
    """
    batch, heads, n, dim = keys.shape
    doublings = np.empty((batch, heads, dim), np.uint8)
    by_row, by_head, by_token, by_channel = keys.stride()
    if by_channel != 1:
        raise ValueError("the channels of a key must be contiguous")
    shape = (by_row, by_head, by_token, batch, heads, n, dim, bits, pointer(scale))
    where = (pointer(codes), *_strides(codes)[:2], at, pointer(doublings))
    library.hi_encode(DTYPES[dtype], pointer(keys), *shape, *where)
    return doublings


def quantise_query(query, scale, out) -> None:
    """As `evaluator.codes.KeyCodes.query`: fold scale fp32 (Hkv, 1, D) into query fp32 (H, D) and quantise the product
    to out int8 (Hkv, G, D). All contiguous.
    """
    library.hi_query(pointer(query), pointer(scale), *out.shape, pointer(out))


def checksums(write: bool, offsets, addresses, lengths, sums: np.ndarray) -> int:
    """As `tiers.checksums.reference`: CRC-32 of each 4 KiB block of pieces int64 (m,), written to or compared with sums
    uint32. Returns the offset of the first block that differs, or -1.
    """
    pieces = [np.ascontiguousarray(part, np.int64) for part in (offsets, addresses, lengths)]
    where = map(pointer, (*pieces, sums))
    return library.hi_checksums(library.isa, int(write), len(offsets), *where)


def pointer(array) -> int | None:
    """Address of the first element of a tensor or array; None for None."""
    if not isinstance(array, np.ndarray):
        return None if array is None else array.data_ptr()
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # three times as fast as numpy's own attribute
    except (TypeError, ValueError):  # empty, read-only or not contiguous
        return array.__array_interface__["data"][0]


def _strides(array) -> tuple[int, ...]:
    """Strides in bytes; codes have one byte per element."""
    return array.stride() if hasattr(array, "data_ptr") else array.strides


def _share(nbytes: int, threads: int) -> int:
    return max(1, min(threads, 64, nbytes // SPLIT))


def _check(result: int) -> None:
    if result < 0:
        raise MemoryError("no memory for the workspace of a kernel")
