"""INT8 and INT4 key codes and their exact scores (HillInfer CEC: low precision for scoring only).

The channel scales are folded into the query, which is then quantised as well, so that a score is an integer dot
product: bit-identical in numpy, torch, the emulated drive and hardware. `ranks` compares scores of different heads.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from hillinfer import native
from hillinfer.evaluator.ranks import STEPS, head_ranks_reference
from hillinfer.growable import Growable

TOP = {8: 127, 4: 7}  # largest code by bits; symmetric
EXACT_FP32_DIM = 2**24 // TOP[8] ** 2  # 1,040: the largest head_dim with exact fp32 sums of code products
TINY = torch.finfo(torch.float32).tiny
NEVER = torch.iinfo(torch.int32).min  # the score of padding: below every real one


class KeyCodes:
    """Codes of one layer's keys around a zero point, with a scale, both per KV head and channel, (B, Hkv, 1, D).

    The zero point, the middle of the first keys' range, shifts all scores of a head alike: scoring does without it.

    `codes` is (B, Hkv, n, D) for INT8, and (B, Hkv, n, D/2) for INT4 with even channels in the low nibbles.
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, bits: int = 8, device="cpu"):
        if head_dim > EXACT_FP32_DIM:
            raise ValueError(f"head_dim {head_dim} is above {EXACT_FP32_DIM}: fp32 scores would be inexact")
        if bits == 4 and head_dim % 2:
            raise ValueError(f"INT4 needs an even head_dim, not {head_dim}; use int8")
        self.bits = bits
        self.codes = Growable((batch, kv_heads, 0, head_dim * bits // 8), 2, torch.int8, device)
        self.scale = torch.zeros((batch, kv_heads, 1, head_dim), dtype=torch.float32, device=device)
        self.zero = torch.zeros_like(self.scale)

    def append(self, keys: torch.Tensor) -> torch.Tensor:
        """Encode new keys (B, Hkv, n, D). Returns the doublings of each channel's scale, uint8 (B, Hkv, D).

        If a key exceeds a channel's scale, the scale doubles until it fits and the old codes are halved accordingly:
        codes never saturate and differ from direct quantisation by at most one step.
        """
        keys = keys.to(self.scale.device)
        if keys.device.type != "cpu" or not native.available():
            return self.append_reference(keys.float())
        if keys.stride(3) != 1 or keys.dtype not in (torch.float32, torch.bfloat16):
            keys = keys.float().contiguous()
        at = self.codes.extend(keys.shape[2])
        return torch.from_numpy(native.encode(keys, self.bits, self.scale, self.zero, self.codes.data, at))

    def append_reference(self, keys: torch.Tensor) -> torch.Tensor:
        """`append` in torch, for fp32 keys where the codes are."""
        new, doublings, times = self.fit(keys)
        if doublings.any():
            self.halve(self.codes.n, (1 / times).bfloat16())
        self.codes.append(new)
        return doublings.squeeze(2).to(torch.uint8)

    def fit(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Double scales until keys fit: the keys' codes as stored, the doublings (B, Hkv, 1, D), and 2 to them."""
        if self.codes.n == 0:
            self.zero = (keys.amin(2, keepdim=True) + keys.amax(2, keepdim=True)) / 2
        keys = keys - self.zero
        need = torch.linalg.vector_norm(keys, torch.inf, 2, keepdim=True) / TOP[self.bits]
        fresh = self.scale == 0
        mantissa, exponent = torch.frexp(need / self.scale)  # exact ceiling of log2
        exponent -= (mantissa == 0.5).int()
        doublings = torch.where(fresh, 0, exponent).clamp_(min=0)
        times = 2 ** doublings.long()
        self.scale = torch.where(fresh, need, self.scale * times)
        new = (keys / self.scale.clamp(min=TINY)).round_().clamp_(-TOP[self.bits], TOP[self.bits])
        return pack(new.to(torch.int8), self.bits), doublings, times

    def halve(self, n: int, shares: torch.Tensor) -> None:
        """Multiply the oldest n codes by powers of two, bf16 (B, Hkv, 1, D), which holds them exactly."""
        old = self.codes.view()[:, :, :n]
        old.copy_(pack((unpack(old, self.bits) * shares).round_().to(torch.int8), self.bits))

    def newest(self, n: int) -> torch.Tensor:
        """Codes of the last n keys, int8 (B, Hkv, n, D), for a drive that scores."""
        return unpack(self.codes.view()[:, :, self.codes.n - n :], self.bits)

    def query(self, query: torch.Tensor, row: int) -> tuple[torch.Tensor, np.ndarray]:
        """Fold the scales into a query (H, D) and quantise it to INT8: (Hkv, G, D). All heads of a group share one step
        size; the step sizes, float32 (Hkv,), turn scores into dot products.
        """
        query, scale = query.to("cpu", torch.float32), self.scale[row]
        if not native.available():
            out, step = fold(query, scale)
            return out, step.numpy()
        out = torch.empty((len(scale), len(query) // len(scale), scale.shape[2]), dtype=torch.int8, device="cpu")
        return out, native.quantise_query(query.contiguous(), scale, out)

    def ranks(self, query: torch.Tensor, scaling: float, valid: torch.Tensor | None) -> torch.Tensor:
        """`ranks.head_ranks` of all keys, int32 (B, n), where the codes are: queries (B, H, D), and valid bool (B, n),
        False for padding, or None.
        """
        coded, unit = fold(query.float(), self.scale)
        scores = products(coded, unpack(self.codes.view(), self.bits)).flatten(1, 2).int()
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], NEVER)
        steps = unit * scaling * float(np.float32(STEPS / np.log(2)))
        return head_ranks_reference(scores, steps[..., None].expand(coded.shape[:3]).flatten(1))

    def scorer(self, query: torch.Tensor, row: int) -> Callable[[np.ndarray | None], np.ndarray]:
        """`head_scores` of a quantised query (Hkv, G, D) against a row's keys, at positions (m,) or None for all."""
        stored = self.codes.view()[row]
        if native.available():  # without a function in between, for a layer's every step
            return partial(native.score, query, stored, self.bits, threads=torch.get_num_threads())
        return partial(head_scores, query, stored, self.bits)

    def truncate(self, n: int) -> None:
        self.codes.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.codes.reorder(rows)
        rows = rows.to(self.scale.device)
        self.scale, self.zero = (part.index_select(0, rows) for part in (self.scale, self.zero))

    @property
    def nbytes(self) -> int:
        return self.codes.view().nbytes + 2 * self.scale.nbytes


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes (..., D) in storage format: INT4 has two to a byte, (..., D/2)."""
    return codes if bits == 8 else (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def unpack(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: int8 codes (..., D)."""
    if bits == 8:
        return stored
    return torch.stack(((stored << 4) >> 4, stored >> 4), -1).flatten(-2)  # arithmetic shifts extend the sign


def fold(query: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`KeyCodes.query` in torch, on any device: queries fp32 (..., H, D) and scales (..., Hkv, 1, D)."""
    folded = query.unflatten(-2, (scale.shape[-3], -1)) * scale
    step = (torch.linalg.vector_norm(folded, torch.inf, (-2, -1), keepdim=True) / TOP[8]).clamp(min=TINY)
    return (folded / step).round_().clamp_(-TOP[8], TOP[8]).to(torch.int8), step[..., 0, 0]


def products(query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Dot products of int8 (..., G, D) and (..., n, D): whole numbers, fp32 (..., G, n), on any device.

    fp32 is exact: every partial sum is an integer below 2**24; and bf16 holds codes exactly.
    """
    if codes.device.type != "cuda":
        return torch.cat([query.float() @ part.float().mT for part in codes.split(4096, -2)], -1)  # as caches like it
    asked, keys = (part.flatten(0, -3).bfloat16() for part in (query, codes))
    return torch.bmm(asked, keys.mT, out_dtype=torch.float32).unflatten(0, codes.shape[:-2])


def head_scores(
    query: torch.Tensor, stored: torch.Tensor, bits: int = 8, positions: np.ndarray | None = None
) -> np.ndarray:
    """Scores of query int8 (Hkv, G, D) against stored codes (Hkv, n, D or D/2), optionally at positions (m,) only.

    int32 (Hkv*G, n or m).
    """
    if native.available():
        return native.score(query, stored, bits, positions, torch.get_num_threads())
    stored = stored if positions is None else stored[:, torch.from_numpy(positions)]
    return products(query, unpack(stored, bits)).flatten(0, 1).int().numpy()


def head_scores_reference(query: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The definition, in int64 numpy over unpacked codes. Every other implementation must equal it exactly."""
    scores = np.einsum("hgd,hnd->hgn", query.astype(np.int64), codes.astype(np.int64))
    return scores.reshape(query.shape[0] * query.shape[1], codes.shape[1]).astype(np.int32)
