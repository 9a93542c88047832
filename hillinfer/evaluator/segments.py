"""2-bit key codes: four levels over the range that a channel has in a segment of tokens.

Rotary channels drift: the range of a whole context would be too wide, and that of its first tokens wrong later on. So
each segment has its own (KIVI groups tokens alike, arXiv 2402.02750), in steps of the INT8 codes that it is made of:
scores stay integers, in INT8's unit. The newest tokens, which are selected most, keep their INT8 codes.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from hillinfer import native
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.growable import Growable

SEGMENT, BLOCK = 128, 16  # tokens; keys whose words are interleaved for native/scan.c


class SegmentCodes:
    """2-bit codes of one layer's keys in whole segments, and INT8 codes of the newest 1 to SEGMENT.

    codes   int8 (B, Hkv, S * SEGMENT, D/4), D padded to 16 channels: see `interleave`
    ranges  int8 (B, Hkv, S, 2, D): the lowest and highest INT8 code of a segment, of which a 2-bit code is a quarter
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int):
        self.newest = KeyCodes(batch, kv_heads, head_dim)
        self.codes = Growable((batch, kv_heads, 0, -(-head_dim // 16) * 4), 2, torch.int8)
        self.ranges = Growable((batch, kv_heads, 0, 2, head_dim), 2, torch.int8)

    def append(self, keys: torch.Tensor) -> None:
        """Encode new keys (B, Hkv, n, D)."""
        doublings, ranges, newest = self.newest.append(keys), self.ranges.view(), self.newest.codes
        if ranges.numel() and doublings.any():
            ranges.copy_((ranges / 2.0 ** doublings[:, :, None, None]).round_())
        full = (newest.n - 1) // SEGMENT * SEGMENT
        for start in range(0, full, SEGMENT):
            part = newest.view()[:, :, start : start + SEGMENT].short()
            low, high = part.amin(2, keepdim=True), part.amax(2, keepdim=True)
            self.codes.append(interleave((part - low) * 4 // (high - low + 1)))
            self.ranges.append(torch.stack((low, high), 3).to(torch.int8))
        newest.drop(full)

    def query(self, query: torch.Tensor, row: int) -> tuple[torch.Tensor, np.ndarray]:
        """See `KeyCodes.query`."""
        return self.newest.query(query, row)

    def scorer(self, query: torch.Tensor, row: int) -> Callable[[None], np.ndarray]:
        """Scores of a quantised query (Hkv, G, D) against all of a row's keys, int32 (Hkv*G, n), in INT8's unit."""
        return partial(self._scores, query, row)

    def _scores(self, query: torch.Tensor, row: int, positions: None) -> np.ndarray:
        old, newest = self.codes.n, self.newest.scorer(query, row)(None)
        out = np.empty((len(newest), old + newest.shape[1]), np.int32)
        out[:, old:] = newest
        stored = self.codes.view()[row], self.ranges.view()[row]
        if native.available():
            native.scan(query, *stored, SEGMENT, out, torch.get_num_threads())
        else:
            out[:, :old] = segment_scores_torch(query, *stored)
        return out

    def truncate(self, n: int) -> None:
        kept = max(0, n - 1) // SEGMENT
        if kept < self.ranges.n:  # the newest tokens are of a segment: back to INT8, in the middle of their quarters
            low, high = self.ranges.view()[:, :, kept].short().split(1, 2)
            quarter = uninterleave(self.codes.view()[:, :, kept * SEGMENT : (kept + 1) * SEGMENT])[..., : low.shape[3]]
            self.newest.truncate(0)
            self.newest.codes.append((low + (high - low + 1) * (2 * quarter + 1) // 8).to(torch.int8))
            self.codes.truncate(kept * SEGMENT)
            self.ranges.truncate(kept)
        self.newest.truncate(n - self.codes.n)

    def reorder(self, rows: torch.Tensor) -> None:
        for part in (self.newest, self.codes, self.ranges):
            part.reorder(rows)

    @property
    def nbytes(self) -> int:
        return self.newest.nbytes + self.codes.view().nbytes + self.ranges.view().nbytes


def open_codes(batch: int, kv_heads: int, head_dim: int, bits: int, device="cpu") -> KeyCodes | SegmentCodes:
    """Codes of 8, 4 or 2 bits; those of 2 bits are in host memory."""
    return SegmentCodes(batch, kv_heads, head_dim) if bits == 2 else KeyCodes(batch, kv_heads, head_dim, bits, device)


def interleave(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 3 (..., n, D) as bytes int8 (..., n, D/4), D padded to 16 channels: blocks of BLOCK keys, of each the
    same four bytes in turn. Byte j of 16 channels holds channels j, 4 + j, 8 + j and 12 + j, from the low bits up.
    """
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % 16)).unflatten(-1, (-1, 4, 4))
    packed = sum(padded[..., plane, :] << 2 * plane for plane in range(4))  # (..., n, D/16, 4)
    blocks = packed.unflatten(-3, (-1, BLOCK)).transpose(-3, -2).flatten(-3)
    return blocks.view(torch.int8).reshape(*codes.shape[:-1], -1)


def uninterleave(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `interleave`, int16 (..., n, D padded)."""
    blocks = stored.unflatten(-2, (-1, BLOCK)).flatten(-2).unflatten(-1, (-1, BLOCK, 4)).transpose(-3, -2)
    packed = blocks.flatten(-4, -3).short()  # (..., n, D/16, 4)
    return torch.stack([packed >> 2 * plane & 3 for plane in range(4)], -2).flatten(-3)


def segment_scores_torch(query: torch.Tensor, stored: torch.Tensor, ranges: torch.Tensor) -> np.ndarray:
    """Scores int32 (Hkv*G, n) of a query int8 (Hkv, G, D) against stored codes (Hkv, n, D/4) and ranges (Hkv, S, 2, D):
    the definition. fp32 is exact: every partial sum is an integer below 2**24.
    """
    low, high = ranges.int().unbind(2)
    span, query = (high - low + 1)[:, None], query.int()[:, :, None]
    shift = (query * (8 * low[:, None] + span - 4)).sum(3) + 4 >> 3  # the score of code 0
    own = (query * span + 128 >> 8).float()  # (Hkv, G, S, D)
    codes = uninterleave(stored)[..., : own.shape[3]].unflatten(1, (-1, SEGMENT)).float()
    sums = torch.einsum("hgsd,hsnd->hgsn", own, codes).int()
    return (64 * sums + shift[..., None]).flatten(2).flatten(0, 1).numpy()
