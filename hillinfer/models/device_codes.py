"""Key codes in a GPU's memory, their scores and ranks: no call makes the host wait. `KeyCodes` is the definition.

The host cannot know without a wait whether a scale doubled. Old codes are halved as they are scored, and rewritten with
the next append unless the GPU has said by then that none doubled.
"""

import functools

import numpy as np
import torch

from hillinfer.evaluator import segments
from hillinfer.evaluator.codes import EXACT_FP32_DIM, NEVER, KeyCodes, fold, products, unpack
from hillinfer.evaluator.ranks import FAR, STEPS

LIFT = 192.0  # bf16 near it has no fractions: adding it rounds, ties to even
FIRST, LAST = 20, 44  # log2 of one token's greatest weight, and of more than any sum of them


def open_codes(batch: int, kv_heads: int, head_dim: int, bits: int, device: torch.device) -> KeyCodes:
    """As `segments.open_codes`, of which codes of 2 bits and those in host memory are."""
    kind = segments.open_codes if device.type == "cpu" or bits == 2 else DeviceCodes
    return kind(batch, kv_heads, head_dim, bits, device)


class DeviceCodes(KeyCodes):
    """`KeyCodes` on a GPU.

    shares  bf16 (B, Hkv, 1, D), what remains of the oldest `late` codes: halving twice rounds twice, so that shares of
            two appends do not multiply
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, bits: int, device: torch.device):
        super().__init__(batch, kv_heads, head_dim, bits, device)
        self.shares, self.late = torch.ones_like(self.scale).bfloat16(), 0
        sums(self.scale.device)  # made while nobody waits

    def append(self, keys: torch.Tensor) -> torch.Tensor:
        """See `KeyCodes.append`."""
        self.catch_up()
        new, doublings, times = self.fit(keys.to(self.scale.device).float())
        self.shares, self.late, doubled = (1 / times).bfloat16(), self.codes.n, doublings.any()
        self.doubled = torch.tensor(True, device="cpu").pin_memory().copy_(doubled, non_blocking=True)
        if keys.shape[3] > EXACT_FP32_DIM // 2:  # with LIFT sums are twice as large
            self.catch_up()
        self.codes.append(new)
        return doublings.squeeze(2).to(torch.uint8)

    def catch_up(self) -> None:
        """Rewrite the codes whose scale doubled with the last append."""
        if self.late and self.doubled:
            self.halve(self.late, self.shares)
        self.late = 0

    def ranks(self, query: torch.Tensor, scaling: float, valid: torch.Tensor | None) -> torch.Tensor:
        """See `KeyCodes.ranks`."""
        coded, unit = fold(query.float(), self.scale)
        codes, lift = unpack(self.codes.view(), self.bits), torch.where(self.shares < 1, LIFT, self.shares * 0)
        halved = torch.addcmul(lift, codes, self.shares)  # in one pass: read as int8, rounded to bf16
        halved[:, :, self.late :] = codes[:, :, self.late :]
        scores = products(coded, halved)
        scores[..., : self.late] -= products(coded, lift)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], NEVER)
        steps = unit * scaling * float(np.float32(STEPS / np.log(2)))
        return head_ranks(scores.flatten(1, 2), steps[..., None].expand(coded.shape[:3]).flatten(1))

    def reorder(self, rows: torch.Tensor) -> None:
        super().reorder(rows)
        self.shares = self.shares.index_select(0, rows.to(self.shares.device))


def head_ranks(scores: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """`ranks.head_ranks_reference` in fewer passes: whole scores fp32 (..., H, n) below 2**24, or NEVER."""
    apart = (scores.amax(-1, keepdim=True) - scores).mul_(steps[..., None]).clamp_(max=FAR)
    below = apart.int()
    # 2**20 * 2**(-below / STEPS), nearly: the bits of a float are linear between powers of two
    weights = torch.rsub(below.clamp(max=(FIRST + 2) * STEPS), FIRST + 127 << 23, alpha=1 << 11).view(torch.float32)
    level = torch.searchsorted(sums(scores.device), weights.long().sum(-1), right=True, out_int32=True) - 1
    return below.add_(level[..., None]).amin(-2).neg_()


@functools.cache
def sums(device: torch.device) -> torch.Tensor:
    """The least sum of weights, int64, of each level: log2 of a sum, less FIRST, in STEPS, rounded down."""
    level, least = np.arange(STEPS), np.full(STEPS, 1 << 31, np.uint64)  # of 32 bits, by bisection
    for bit in reversed(range(31)):
        m, fraction = least + (1 << bit) - 1, 0
        for _ in range(12):  # a bit of the fraction for each squaring
            m = m * m >> 31
            fraction = fraction << 1 | m >> 32
            m >>= m >> 32
        least = np.where(fraction < level, least + (1 << bit), least)
    each = [least + (1 << 31 - at) - 1 >> 31 - at if at < 32 else least << at - 31 for at in range(FIRST, LAST)]
    return torch.from_numpy(np.concatenate(each).astype(np.int64)).to(device)
