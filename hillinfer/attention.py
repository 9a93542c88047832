"""Attention: of one query token over records where they lie, by the native kernel, or over tensors, by torch; of
several tokens over KV that comes in parts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hillinfer import native

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def is_native(query: torch.Tensor) -> bool:
    """Whether the kernel can serve this query: it reads host memory."""
    host = query.device.type == "cpu" and native.NAMES[query.dtype] in native.DTYPES
    return host and query.shape[3] <= native.MAX_DIM and native.available()


def over_records(
    query: torch.Tensor,
    rows: list[np.ndarray | tuple],
    kv_heads: int,
    scaling: float,
    side: int | None = None,
    softcap: float = 0.0,
    pairs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (B, H, 1, D) over each row's records K (Hkv, D), V (Hkv, D) of its dtype, given by `native.attend`'s
    addresses, `side` and `pairs`: (B, 1, H, D), and the logsumexp of the scaled logits (B, H) fp32. No gather buffer,
    and sums in fp32.
    """
    batch, heads, _, dim = query.shape
    whole, threads = query.float().reshape(batch, heads, dim), torch.get_num_threads()
    shapes = (batch, 1, heads, dim), (batch, heads)
    out, lse = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    dtype = native.NAMES[query.dtype]
    native.attend(whole.contiguous(), rows, dtype, kv_heads, scaling, out, lse, threads, side, softcap, pairs)
    return out.to(query.dtype), lse


def over_tensors(
    query: torch.Tensor, kv: torch.Tensor, valid: torch.Tensor | None, scaling: float, softcap=0.0, sums: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`over_records` in torch, and its definition: kv (B, n, 2, Hkv, D), valid (B, n) bool or None. Without `sums` no
    logsumexp, for which all keys become fp32.
    """
    batch, heads, _, dim = query.shape
    grouped = query.view(batch, kv.shape[3], -1, dim)  # (B, Hkv, G, D): a group shares its keys, nothing is repeated
    keys, values = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    weighed = logits(query, kv[:, :, 0], valid, scaling, softcap) if sums or softcap else None
    if softcap:
        out = (weighed.softmax(-1).nan_to_num() @ values.float()).to(query.dtype)
    else:
        mask = None if valid is None else valid[:, None, None]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, heads, dim), weighed.logsumexp(-1).flatten(1) if sums else None


def logits(
    query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None, scaling: float, softcap: float = 0.0
) -> torch.Tensor:
    """Scaled logits of a query (B, H, 1, D) over keys (B, n, Hkv, D), fp32 (B, Hkv, G, n); -inf where not valid.

    softcap  c > 0 turns each logit x into c * tanh(x / c), as in Gemma 2 (arXiv 2408.00118)
    """
    keys = keys.permute(0, 2, 3, 1).float()  # (B, Hkv, D, n)
    out = query.float().view(len(keys), keys.shape[1], -1, keys.shape[2]) * scaling @ keys
    out = softcap * torch.tanh(out / softcap) if softcap else out
    return out if valid is None else out.masked_fill_(~valid[:, None, None], -torch.inf)


def merge(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over disjoint sets of records from that over each: outputs (..., D) and logsumexps (...), both fp32."""
    out, lse = None, None
    for other, more in parts:
        if out is None:
            out, lse = other, more
            continue
        total = torch.logaddexp(lse, more)  # minus infinity where no part has a token: nan below, and weight 0
        mine, theirs = ((part - total).exp().nan_to_num().unsqueeze(-1) for part in (lse, more))
        out = out * mine + other * theirs
        lse = total
    return out, lse


def over_parts(
    query: torch.Tensor, parts: Iterable[torch.Tensor], mask: torch.Tensor | None, scaling: float, n: int
) -> torch.Tensor:
    """Attention of several tokens, query (B, H, q, D), over records (B, m, 2, Hkv, D) that together hold all n tokens
    in order: a prefill chunk or a new turn never needs all of a layer's KV at once.

    mask  broadcasts to (B, 1, q, n), as `attendable` takes it; None if the queries are the newest tokens, unpadded
    Returns (B, H, q, D) in the query's type.
    """
    rows, device = query.shape[2], query.device

    def attended() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        start = 0
        for kv in parts:
            for part in filter(torch.numel, kv.tensor_split([max(0, n - rows - start)], 1)):  # what all see, the rest
                yield over_part(query, to_device(part, device), shown(start, start + part.shape[1]), scaling)
                start += part.shape[1]

    def shown(start: int, stop: int) -> torch.Tensor | None:
        seen = None if mask is None else attendable(mask[..., start:stop])
        if seen is None:
            seen = torch.ones((1, 1, rows, stop - start), dtype=torch.bool, device=device).tril_(n - rows - start)
        return None if device.type == "cpu" and seen.all() else seen  # to ask a GPU would make the host wait

    return merge(attended())[0].to(query.dtype)


def over_part(
    query: torch.Tensor, kv: torch.Tensor, shown: torch.Tensor | None, scaling: float, flash: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (B, H, q, D) over records (B, m, 2, Hkv, D), of which `shown` (B, 1, q, m) may be attended to: the output,
    fp32 (B, H, q, D), and the logsumexp, fp32 (B, H, q). By definition, or by torch's flash attention for CPUs.
    """
    keys, values = kv.permute(2, 0, 3, 1, 4)
    grouped, flash = query.unflatten(1, (keys.shape[1], -1)), flash and query.device.type == "cpu"
    if flash and shown is not None and torch.equal(shown, torch.ones_like(shown).tril_()):
        each = [FLASH(own, keys, values, is_causal=True, scale=scaling) for own in grouped.unbind(2)]
        out, lse = (torch.stack(part, 2) for part in zip(*each, strict=True))
        return out.float().reshape(query.shape), lse.reshape(query.shape[:3])
    paired = shown is None and query.dtype == torch.bfloat16 and query.shape[3] % 64 == 0 and is_native(query)
    if flash and paired and native.isa() == "avx512-bf16":  # half of flash attention's time
        rows, side = strided(kv)
        out, lse = over_records(grouped.flatten(1, 3)[:, :, None], rows, keys.shape[1], scaling, side, 0.0, True)
        return out.float().reshape(query.shape), lse.reshape(query.shape[:3])
    grouped, hidden = grouped.flatten(2, 3), None  # keys are not repeated
    if shown is not None:
        hidden = torch.zeros(shown.shape, dtype=query.dtype, device=query.device).masked_fill_(~shown, -torch.inf)
        hidden = hidden.repeat(1, 1, grouped.shape[2] // query.shape[2], 1)
    if flash:
        out, lse = FLASH(grouped, keys, values, attn_mask=hidden, scale=scaling)
        if hidden is not None:  # torch says 0 for a query that sees nothing
            lse = lse.masked_fill(hidden.amax(3) == -torch.inf, -torch.inf)
    else:
        weighed = grouped.float() * scaling @ keys.float().transpose(2, 3) + (0 if hidden is None else hidden)
        out, lse = weighed.softmax(3).nan_to_num() @ values.float(), weighed.logsumexp(3)
    return out.float().reshape(query.shape), lse.reshape(query.shape[:3])


def strided(kv: torch.Tensor) -> tuple[list[tuple[int, int, int]], int]:
    """Records (B, n, 2, Hkv, D), whose heads are contiguous, as `native.attend` takes them: rows and side."""
    each, width, side = (stride * kv.element_size() for stride in kv.stride()[:3])
    return [(kv.data_ptr() + row * each, width, kv.shape[1]) for row in range(len(kv))], side


def attention_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | np.ndarray | None,
    softcap: float = 0.0,
) -> np.ndarray:
    """query (H, D), keys (k, Hkv, D), valid (k,) or None -> softmax weights (H, k) float32."""
    shown, query = None if valid is None else torch.as_tensor(valid, device=keys.device)[None], query.to(keys.device)
    return logits(query[None, :, None], keys[None], shown, scaling, softcap).softmax(-1).flatten(0, 2).cpu().numpy()


def to_device(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. From host memory to another the host does not wait: torch keeps what the copy reads."""
    return part if part.device == device else part.pin_memory().to(device, non_blocking=True)


def attendable(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bool, whether it came so or as numbers to be added to logits."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def padded(part: torch.Tensor, dim: int) -> torch.Tensor:
    """(..., D) with zeros up to `dim` channels, which change no dot product."""
    return part if part.shape[-1] == dim else F.pad(part, (0, dim - part.shape[-1]))


def narrowed(part: torch.Tensor, dim: int) -> torch.Tensor:
    """(..., D) without the zeros."""
    return part if part.shape[-1] == dim else part[..., :dim]


@dataclass(frozen=True)
class Observed:
    """What an observer sees of a decode step in one layer: the first sequence; its KV heads one by one, if they select
    apart.

    query    (H, D)
    keys     (k, Hkv, D), at least those at `pick`
    pick     the attended positions (k,), or None for all n
    visible  (n,) bool, False for padding; None without padding
    """

    layer: int
    step: int
    query: torch.Tensor
    keys: torch.Tensor
    pick: np.ndarray | None
    n: int
    scaling: float
    visible: torch.Tensor | None
    all_keys: Callable[[], torch.Tensor]  # (n, Hkv, D); reads all KV

    @property
    def positions(self) -> np.ndarray:
        return np.arange(self.n) if self.pick is None else self.pick

    def weights(self, exact: bool) -> np.ndarray:
        """Softmax weights without a soft cap, float32 (H, n) if `exact`, else (H, k) over the attended tokens."""
        if exact:
            return attention_weights(self.query, self.all_keys(), self.scaling, self.visible)
        shown = None if self.visible is None else self.visible[torch.from_numpy(self.positions).to(self.visible.device)]
        return attention_weights(self.query, self.keys[: len(self.positions)], self.scaling, shown)
