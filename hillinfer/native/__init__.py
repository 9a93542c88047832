"""Kernels in C beside their plain references in torch and numpy, which stay the definition. numpy only.

Each function takes torch tensors or numpy arrays that lie in host memory, and runs without the interpreter lock.
`available()` says whether there are any; a caller asks it and else uses the reference.
"""

import ctypes
import threading

import numpy as np

from hillinfer.native.build import Unavailable, load

ISAS = ("generic", "neon", "avx2", "avx512-vnni")  # in the order of speed, as in common.h
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
MAX_DIM = 1024  # of a head that `attend` and `bounds` take, as in common.h
SPLIT = 1 << 20  # bytes of keys or records below which a second thread costs more than it brings
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "hi_isas": (_I, []),
    "hi_score": (_I, [_I, _I, _P, _L, _P, _I, _I, _I, _P, _L, _P, _L, _I]),
    "hi_topk": (_L, [_I, _P, _L, _L, _P]),
    "hi_merge": (_L, [_I, _P, _L, _I, _L, _L, _P, _I]),
    "hi_attend": (_I, [_I, _I, _P, _P, _L, _L, _L, _P, _I, _I, _I, ctypes.c_float, _P, _P, _I]),
    "hi_bounds": (_I, [_I, _P, _P, _P, _L, _P, _I, _I, _I, ctypes.c_float, _P, _P, _P, _I]),
    "hi_copy": (None, [_P, _P, _P, _L, _L, _I]),
    "hi_query": (None, [_P, _P, _I, _I, _I, _P]),
    "hi_read": (ctypes.c_uint64, [_I, _P, _L, _I]),
    "hi_ring_open": (_P, [_I, _P]),
    "hi_ring_close": (None, [_P]),
    "hi_ring_run": (_I, [_P, _I, _I, _L, _P, _P, _P, _P, _P, _L, _I, _P]),
    "hi_ring_flying": (_L, [_P]),
    "hi_checksums": (_L, [_I, _I, _L, _P, _P, _P, _P]),
    "hi_encode": (_I, [_I, _P, _L, _L, _L, _I, _I, _L, _I, _I, _P, _P, _L, _L, _L, _P]),
}


class _Library:
    """The loaded functions, and which instruction set they use."""

    def __init__(self):
        self._lock, self._tried = threading.Lock(), False
        self.reason, self.isa, self.isas = None, 0, ()

    def __getattr__(self, name: str):
        """A function that is asked for before anyone asked whether there is one."""
        if name.startswith("hi_") and self.ready():
            return self.__dict__[name]
        raise Unavailable(self.reason or name)

    def ready(self) -> bool:
        if not self._tried:
            with self._lock:
                if not self._tried:
                    self._open()
                    self._tried = True
        return self.reason is None

    def _open(self) -> None:
        try:
            library = load()
        except Unavailable as error:
            self.reason = str(error)
            return
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.library = library
        self.isas = tuple(isa for isa in range(len(ISAS)) if library.hi_isas() >> isa & 1)
        self.isa = self.isas[-1]


_library = _Library()


def available() -> bool:
    """Whether the kernels can be used here; the first call may compile them, for a few seconds."""
    return _library.ready()


def why_not() -> str | None:
    """Why they cannot, in one line with the fix; None where they can."""
    available()
    return _library.reason


def isa() -> str:
    """The instruction set in use."""
    return ISAS[_library.isa] if available() else "none"


def isas() -> list[str]:
    """Those that this machine has, slowest first."""
    return [ISAS[i] for i in _library.isas] if available() else []


def use_isa(name: str) -> None:
    """Use this one of `isas()` from now on; for tests and measurements."""
    _library.isa = {ISAS[i]: i for i in _library.isas}[name]


def isa_number() -> int:
    """As the library counts them."""
    return _library.isa


def call(name: str, *arguments):
    """A function of the library by name, for what has a module of its own."""
    return getattr(_library, name)(*arguments)


def read(words: np.ndarray, threads: int = 1) -> int:
    """The sum of uint64 words: as fast as cores read memory."""
    return _library.hi_read(_library.isa, pointer(words), len(words), threads)


def score(query, stored, bits: int, positions: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """Scores of a quantised query int8 (Hkv, G, D) against codes (Hkv, n, D*bits/8), all or those at positions (m,).

    int32 (Hkv, n or m), the best of each group. The definition is `evaluator.codes.group_scores_reference`.
    """
    heads, group, dim = query.shape
    row = dim * bits // 8
    strides, (_, n, width) = _strides(stored), stored.shape
    query = np.ascontiguousarray(_numpy(query))
    if strides[1:] != (row, 1) or width != row:
        raise ValueError(f"codes of a head must lie row by row, {row} bytes each, not with strides {strides}")
    if positions is not None:
        positions = np.ascontiguousarray(positions, np.int64)
        if len(positions) and not (positions.min() >= 0 and positions.max() < n):
            raise IndexError(f"positions must be in [0, {n})")
        n = len(positions)
    out = np.empty((heads, n), np.int32)
    where = None if positions is None else pointer(positions)
    shape = (heads, group, dim, where, n, pointer(out), n, _share(heads * n * row, threads))
    _check(_library.hi_score(_library.isa, bits, pointer(stored), strides[0], pointer(query), *shape))
    return out


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """As `evaluator.topk.topk_reference`: positions of the k best of int32 (n,), best first."""
    scores, k = np.ascontiguousarray(scores), min(k, len(scores))
    out = np.empty(k, np.int32)
    _check(_library.hi_topk(_library.isa, pointer(scores), len(scores), k, pointer(out)))
    return out.astype(np.int64)


def merge_heads(scores: np.ndarray, k: int, threads: int = 1) -> np.ndarray:
    """As `evaluator.topk.merge_heads_reference`: one selection of k positions, ascending, from int32 (Hkv, n)."""
    if scores.strides[1] != 4:
        scores = np.ascontiguousarray(scores)
    heads, n = scores.shape
    out = np.empty(min(k, n), np.int64)
    threads = _share(scores.nbytes, threads)
    shape = (scores.strides[0] // 4, heads, n, len(out), pointer(out), threads)
    _check(_library.hi_merge(_library.isa, pointer(scores), *shape))
    return out


def attend(
    query, rows: list, dtype: str, kv_heads: int, scale: float, out, lse, threads: int = 1, side: int | None = None
) -> None:
    """Attention of queries fp32 (B, H, D), each over its row's records K (Hkv, D), V (Hkv, D), into out fp32 of as many
    elements, and the logsumexp of the scaled logits into lse fp32 (B, H); all contiguous.

    rows  for each query int64 addresses (n,), or (address, bytes from one to the next, n) where records lie in order.
          The caller keeps the memory alive
    side  bytes from a record's keys to its values; without it they follow the keys
    """
    heads, dim = query.shape[1:]
    width = 2 * kv_heads * dim * (4 if dtype == "float32" else 2)
    read, write, sums, kind = pointer(query), pointer(out), pointer(lse), DTYPES[dtype]
    for number, where in enumerate(rows):
        base, stride, n = where if isinstance(where, tuple) else (None, 0, len(where))
        addresses, at = None if base else pointer(where), number * heads * dim * 4
        records = addresses, base, stride, n, width // 2 if side is None else side
        shape = *records, read + at, kv_heads, heads // kv_heads, dim, scale, write + at, sums + number * heads * 4
        _check(_library.hi_attend(_library.isa, kind, *shape, _share(n * width, threads)))


def bounds(
    query, boxes: np.ndarray, scales: np.ndarray, leaf: np.ndarray, slack: float, floor=None, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """As `evaluator.chunks.bounds`, summed in another order: query fp32 (Hkv, G, D) against int8 boxes (Hkv, 2, D) at
    these addresses int64 (m,), each with its page's scales fp32 (Hkv, D), by address too; leaf bool (m,) says which are
    estimated with `slack`. The best of each group, fp32 (Hkv, m), and which reach the floor fp32 (Hkv, G), bool (m,).
    """
    heads, group, dim = query.shape
    query, floor = query.contiguous(), None if floor is None else floor.contiguous()
    best, reach = np.empty((heads, len(boxes)), np.float32), np.empty(len(boxes), bool)
    where = (pointer(boxes), pointer(scales), pointer(leaf), len(boxes), pointer(query), heads, group, dim, slack)
    wanted = None if floor is None else pointer(floor)
    threads = _share(len(boxes) * 2 * heads * dim, threads)
    _check(_library.hi_bounds(_library.isa, *where, wanted, pointer(best), pointer(reach), threads))
    return best, reach


def copy(addresses: np.ndarray, out, slots: np.ndarray, threads: int = 1) -> None:
    """out[slots] = the records at these addresses, int64 (k,) each; slots differ, out (n, ...) is contiguous."""
    slots = np.ascontiguousarray(slots, np.int64)
    if len(slots) != len(addresses) or (len(slots) and not 0 <= slots.min() <= slots.max() < out.shape[0]):
        raise IndexError(f"{len(addresses)} records for {len(slots)} slots, which must be in [0, {out.shape[0]})")
    width = out.nbytes // max(1, out.shape[0])
    threads = _share(len(slots) * width, threads)
    _library.hi_copy(pointer(addresses), pointer(out), pointer(slots), len(slots), width, threads)


def encode(keys, dtype: str, bits: int, scale, codes, at: int) -> np.ndarray:
    """Code keys (B, Hkv, n, D), fp32 or bf16, into codes (B, Hkv, capacity, D*bits/8) from token `at` on, and let scale
    fp32 (B, Hkv, 1, D) grow as needed. Returns how often each channel doubled, uint8 (B, Hkv, D).

    As `evaluator.codes.KeyCodes` does in torch, to the bit.
    """
    batch, heads, n, dim = keys.shape
    doublings = np.empty((batch, heads, dim), np.uint8)
    by_row, by_head, by_token, by_channel = keys.stride()
    if by_channel != 1:
        raise ValueError("a key's channels must lie side by side")
    shape = (by_row, by_head, by_token, batch, heads, n, dim, bits, pointer(scale))
    where = (pointer(codes), *_strides(codes)[:2], at, pointer(doublings))
    _library.hi_encode(DTYPES[dtype], pointer(keys), *shape, *where)
    return doublings


def quantise_query(query, scale, out) -> None:
    """As `evaluator.codes.KeyCodes.query`: query fp32 (H, D) with scale fp32 (Hkv, 1, D) folded in, out int8
    (Hkv, G, D); all contiguous.
    """
    _library.hi_query(pointer(query), pointer(scale), *out.shape, pointer(out))


def checksums(write: bool, offsets, addresses, lengths, sums: np.ndarray) -> int:
    """As `tiers.checksums.reference`: CRC-32 of each 4 KiB block of pieces int64 (m,), noted in or compared with sums
    uint32. Returns -1, or the offset of the first block that differs.
    """
    pieces = [np.ascontiguousarray(part, np.int64) for part in (offsets, addresses, lengths)]
    where = map(pointer, (*pieces, sums))
    return _library.hi_checksums(_library.isa, int(write), len(offsets), *where)


def pointer(array) -> int:
    """The address of a tensor's or an array's first element."""
    if not isinstance(array, np.ndarray):
        return array.data_ptr()
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # a third of what numpy takes to tell it
    except (TypeError, ValueError):  # empty, read-only or with gaps
        return array.__array_interface__["data"][0]


def _numpy(array) -> np.ndarray:
    return array.numpy() if hasattr(array, "data_ptr") else array


def _strides(array) -> tuple[int, ...]:
    """In bytes; codes have one byte an element."""
    return array.stride() if hasattr(array, "data_ptr") else array.strides


def _share(nbytes: int, threads: int) -> int:
    return max(1, min(threads, 64, nbytes // SPLIT))


def _check(result: int) -> None:
    if result < 0:
        raise MemoryError("no memory for a kernel's working space")
