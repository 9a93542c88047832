"""C kernels beside their torch and numpy references, which remain the definition. This package imports numpy only.

The functions take torch tensors or numpy arrays in host memory and release the GIL. Callers check `available()` and
otherwise use the reference. A wrong call is a TypeError, ValueError or IndexError (`native.fence`).
"""

import ctypes
import math
import threading

import numpy as np

from hillinfer.native.build import Unavailable, load
from hillinfer.native.fence import NAMES, address, code_rows, integers, pointer

ISAS = ("generic", "neon", "avx2", "avx512-vnni", "avx512-bf16")  # slowest first, as in common.h
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
MAX_DIM = 1024  # largest head dimension of `attend` and `bounds`, as in common.h
BLOCK, MOST = 4096, 2**63 - 1  # bytes: of a checksum; of a file
SPLIT = 1 << 20  # bytes of keys or records per thread; with fewer, another thread does not pay
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "hi_isas": (_I, []),
    "hi_score": (_I, [_I, _I, _P, _L, _L, _P, _I, _I, _I, _P, _L, _P, _L, _I]),
    "hi_scan": (None, [_I, _P, _L, _P, _L, _L, _L, _P, _I, _I, _I, _P, _L, _I]),
    "hi_topk": (_L, [_I, _P, _L, _L, _P]),
    "hi_attend": (_I, [_I, _I, _P, _P, _L, _L, _L, _P, _I, _I, _I, ctypes.c_float, ctypes.c_float, _P, _P, _I, _I]),
    "hi_bounds": (_I, [_I, _P, _P, _P, _L, _P, _I, _I, _I, ctypes.c_float, _P, _I]),
    "hi_copy": (_I, [_P, _P, _P, _L, _L, _L, _I]),
    "hi_query": (None, [_P, _P, _I, _I, _I, _P, _P]),
    "hi_ranks": (None, [_I, _P, _I, _L, _P, _P, _I]),
    "hi_read": (ctypes.c_uint64, [_I, _P, _L, _I]),
    "hi_ring_open": (_P, [_I, _I, _P]),
    "hi_ring_close": (None, [_P]),
    "hi_ring_run": (_I, [_P, _P, _I, _L, _P, _P, _P, _P, _P, _L, _I, _P, _L, _L]),
    "hi_ring_result": (_I, [_I, _I, _L, _P]),
    "hi_ring_in_flight": (_L, [_P]),
    "hi_nvme_entry": (None, [_P, _I, _I, _L, _L, _L, _L, _L]),
    "hi_pieces": (_L, [_L, _P, _P, _P, _L, _L, _L, _L]),
    "hi_crc": (ctypes.c_uint32, [_I, _P, _L]),
    "hi_checksums": (_L, [_I, _I, _L, _P, _P, _P, _P]),
    "hi_encode": (_I, [_I, _P, _L, _L, _L, _I, _I, _L, _I, _I, _P, _P, _P, _L, _L, _L, _P]),
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


def read(words: np.ndarray, threads: int = 1) -> int:
    """The sum of uint64 words, computed at memory bandwidth."""
    return library.hi_read(library.isa, address(words, "uint64", words.size), words.size, _share(words.nbytes, threads))


def score(query, stored, bits: int, positions: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """Scores of a quantised query int8 (Hkv, G, D) against codes (Hkv, n, D*bits/8), at all or at given positions (m,).

    Returns int32 (Hkv*G, n or m), defined by `evaluator.codes.head_scores_reference`.
    """
    heads, group, dim = query.shape
    (by_head,), n = code_rows(stored, [heads], dim, bits)
    asked, held = address(query, "int8", heads * group * dim), n
    if positions is not None:
        positions = integers(positions)
        n = len(positions)
    out = np.empty((heads * group, n), np.int32)
    shape = heads, group, dim, pointer(positions), n, pointer(out), n, _share(heads * n * dim * bits // 8, threads)
    _check(library.hi_score(library.isa, bits, pointer(stored), by_head, held, asked, *shape), f"positions < {held}")
    return out


def scan(query, codes, ranges, tokens: int, out: np.ndarray, threads: int = 1) -> None:
    """As `evaluator.segments.segment_scores_torch`, into the first n columns of out, int32 (Hkv*G, n or more). Segments
    have `tokens`, a multiple of 64.
    """
    heads, group, dim = query.shape
    (by_head,), n = code_rows(codes, [heads], -(-dim // 16) * 16, 2)
    (apart,), pairs = code_rows(ranges.flatten(1, 2), [heads], dim, 8)
    if tokens % 64 or n % tokens or pairs != n // tokens * 2 or len(out) != heads * group or out.shape[1] < n:
        raise ValueError(f"{n} codes, {pairs} ranges and scores {out.shape} do not fit {tokens} to a segment")
    stored = pointer(codes), by_head // 4, pointer(ranges), apart, n // tokens, tokens
    asked, write = address(query, "int8", heads * group * dim), address(out, "int32", out.size, True)
    share = _share(heads * n * dim // 4, threads)
    library.hi_scan(library.isa, *stored, asked, heads, group, dim, write, out.shape[1], share)


def topk(scores: np.ndarray, k: int) -> np.ndarray:
    """As `evaluator.topk.topk_reference`: positions of the k largest of int32 (n,), largest first."""
    scores = np.ascontiguousarray(scores)
    out = np.empty(min(k, len(scores)), np.int32)
    where = address(scores, "int32", len(scores))
    _check(library.hi_topk(library.isa, where, len(scores), len(out), pointer(out)))
    return out.astype(np.int64)


def attend(
    query, rows: list, dtype: str, kv_heads: int, scale: float, out, lse, threads=1, side=None, softcap=0.0, pairs=False
) -> None:
    """Attention of queries fp32 (B, H, D), each over the records K (Hkv, D), V (Hkv, D) of its row, into out fp32
    (B, H, D), and the logsumexp of the scaled logits into lse fp32 (B, H). All contiguous.

    rows  per query, addresses int64 (n,), or (first, stride in bytes, n); the caller keeps the memory alive
    side  bytes from a record's keys to its values; None: the values follow the keys
    softcap  c > 0 turns each logit x into c * tanh(x / c)
    pairs    many queries of bf16 share each record: with isa avx512-bf16 weights are rounded to bf16
    """
    batch, heads, dim = query.shape
    fits = 0 < dim <= MAX_DIM and 0 < kv_heads <= heads and heads % kv_heads == 0
    if not fits or len(rows) != batch or dtype not in DTYPES:
        raise ValueError(f"queries {tuple(query.shape)} do not attend to {len(rows)} x {kv_heads} heads of {dtype}")
    kind, width = DTYPES[dtype], 2 * kv_heads * dim * (4 if dtype == "float32" else 2)
    asked, sums = address(query, "float32", batch * heads * dim), address(lse, "float32", batch * heads, True)
    write = address(out, "float32", batch * heads * dim, True)
    for number, where in enumerate(rows):
        if isinstance(where, tuple):
            addresses, (base, stride, n) = None, where
        else:
            addresses, base, stride, n = address(where, "int64", len(where)), None, 0, len(where)
        records, at = (addresses, base, stride, n, width // 2 if side is None else side), number * heads * 4
        shape = asked + at * dim, kv_heads, heads // kv_heads, dim, scale, softcap, write + at * dim, sums + at
        done = library.hi_attend(library.isa, kind, *records, *shape, _share(n * width, threads), int(pairs))
        _check(done, f"records of aligned {dtype}")


def bounds(
    query, boxes: np.ndarray, scales: np.ndarray, leaf: np.ndarray, slack: float, threads: int = 1
) -> np.ndarray:
    """As `systems.boxes.bounds`, but for the order of summation: query fp32 (Hkv, G, D) against int8 boxes
    (Hkv, 2, D) and the scales of their pages, fp32 (Hkv, D), both given as addresses int64 (m,). Returns (Hkv*G, m).

    leaf   bool (m,): boxes estimated with `slack`
    """
    (heads, group, dim), m = query.shape, len(boxes)
    if not (0 < dim <= MAX_DIM and heads and group):
        raise ValueError(f"no bounds for queries {tuple(query.shape)}")
    query, out = query.contiguous(), np.empty((heads * group, m), np.float32)
    where = address(boxes, "int64", m), address(scales, "int64", m), address(leaf, "bool", m), m
    asked = address(query, "float32", heads * group * dim), heads, group, dim, slack
    share = _share(m * 2 * heads * dim, threads)
    _check(library.hi_bounds(library.isa, *where, *asked, pointer(out), share), "aligned boxes")
    return out


def copy(addresses: np.ndarray, out, slots: np.ndarray, threads: int = 1) -> None:
    """Copy the records at addresses int64 (k,) to out[slots]; slots (k,) are distinct, out (n, ...) is contiguous."""
    room, slots, addresses = len(out), integers(slots, len(addresses)), integers(addresses)
    width = out.nbytes // max(1, room)
    where = pointer(addresses), address(out, NAMES[out.dtype], math.prod(out.shape), True), pointer(slots)
    share = _share(len(slots) * width, threads)
    _check(library.hi_copy(*where, len(slots), room, width, share), f"records, and distinct slots < {room}")


def encode(keys, bits: int, scale, zero, codes, at: int) -> np.ndarray:
    """Quantise keys (B, Hkv, n, D), fp32 or bf16, into codes int8 (B, Hkv, capacity, D*bits/8) from token `at` on,
    bit-identical to `evaluator.codes.KeyCodes` in torch. Doubles scale fp32 (B, Hkv, 1, D) where keys exceed it. The
    first tokens set zero, of scale's shape.

    Returns the doublings of each channel, uint8 (B, Hkv, D).
    """
    batch, heads, n, dim = keys.shape
    kind, (by_row, by_head, by_token, by_channel) = NAMES[keys.dtype], keys.stride()
    if kind not in ("float32", "bfloat16") or by_channel != 1 or not keys.is_cpu:
        raise ValueError("keys must be fp32 or bf16 in host memory, the channels of each contiguous")
    by_codes, capacity = code_rows(codes, [batch, heads], dim, bits)
    if not 0 <= at <= capacity - n:
        raise IndexError(f"tokens {at} to {at + n} of {capacity}")
    doublings = np.empty((batch, heads, dim), np.uint8)
    kept = (address(part, "float32", batch * heads * dim, True) for part in (scale, zero))
    where = batch, heads, n, dim, bits, *kept, pointer(codes), *by_codes
    library.hi_encode(DTYPES[kind], pointer(keys), by_row, by_head, by_token, *where, at, pointer(doublings))
    return doublings


def quantise_query(query, scale, out) -> np.ndarray:
    """As `evaluator.codes.KeyCodes.query`: fold scale fp32 (Hkv, 1, D) into query fp32 (H, D) and quantise the product
    to out int8 (Hkv, G, D). All contiguous. Returns the step size of each group, fp32 (Hkv,).
    """
    heads, group, dim = out.shape
    asked, folded = address(query, "float32", heads * group * dim), address(scale, "float32", heads * dim)
    unit, write = np.empty(heads, np.float32), address(out, "int8", heads * group * dim, True)
    library.hi_query(asked, folded, heads, group, dim, write, pointer(unit))
    return unit


def head_ranks(scores: np.ndarray, steps: np.ndarray, threads: int = 1) -> np.ndarray:
    """As `evaluator.ranks.head_ranks_reference`: ranks int32 (n,) by int32 scores (H, n) and steps fp32 (H,)."""
    heads, n = scores.shape
    if not heads:
        raise ValueError("scores of no head")
    threads = min(heads, _share(scores.nbytes, threads))
    out, where = np.empty((threads, n), np.int32), address(scores, "int32", heads * n)
    library.hi_ranks(library.isa, where, heads, n, address(steps, "float32", heads), pointer(out), threads)
    return out[0]


def checksums(write: bool, offsets, addresses, lengths, sums: np.ndarray) -> int:
    """As `tiers.checksums.reference`: CRC-32 of each 4 KiB block of pieces int64 (m,), written to or compared with sums
    uint32. Returns the offset of the first block that differs, or -1.
    """
    parts = pieces(offsets, addresses, lengths, BLOCK, end=len(sums) * BLOCK)
    where = *map(pointer, parts), address(sums, "uint32", len(sums), write)
    return library.hi_checksums(library.isa, int(write), len(parts[0]), *where)


def pieces(offsets, addresses, lengths, unit=1, least=0, most=MOST, end=MOST) -> list[np.ndarray]:
    """Pieces of a file in memory as contiguous int64 (m,) each. ValueError for one that cannot be moved: not in
    multiples of `unit` bytes, shorter than `least` or longer than `most`, beyond `end`, or at no address.
    """
    parts = [integers(part, len(offsets)) for part in (offsets, addresses, lengths)]
    wrong = library.hi_pieces(len(parts[0]), *map(pointer, parts), unit, least, most, end)
    if wrong >= 0:
        raise ValueError(f"piece {wrong} is not of whole {unit} bytes in [0, {end}), or its address or length is wrong")
    return parts


def _share(nbytes: int, threads: int) -> int:
    return max(1, min(threads, 64, nbytes // SPLIT))


def _check(result: int, what: str = "") -> None:
    if result == -1:
        raise MemoryError("no memory for the workspace of a kernel")
    if result < 0:  # WRONG in common.h
        raise IndexError(f"a kernel takes {what} only")
