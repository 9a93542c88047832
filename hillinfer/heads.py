"""KV heads as sequences of their own: each selects, evicts and attends for itself.

Only in memory, where a record of one head is as good as one of all. On a drive a read costs the same for a head as for
all, so a record holds all heads of a token, and they share a selection.
"""

import torch

from hillinfer.layer import Layer


def apart(part: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Queries (B, H, n, D) or keys (B, Hkv, n, D) with a row for each KV head, (B * Hkv, heads, n, D)."""
    return part.reshape(len(part) * kv_heads, -1, *part.shape[2:])


def rows_of(mask: torch.Tensor | None, kv_heads: int) -> torch.Tensor | None:
    """A mask (B or 1, 1, q, N) for the rows of `apart`."""
    return mask if mask is None or len(mask) == 1 else mask.repeat_interleave(kv_heads, 0)


class HeadsLayer(Layer):
    """A layer in memory whose policy and store have a row for each KV head of each sequence."""

    def append(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        self.run.heads = heads = keys.shape[1]
        kv = kv if kv is None else kv.permute(0, 3, 1, 2, 4).flatten(0, 1).unsqueeze(3)
        super().append(apart(keys, heads), apart(values, heads), kv)

    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(part.reshape(-1, self.run.heads, *part.shape[2:]) for part in super().everything())

    def whole(self, kv: torch.Tensor) -> torch.Tensor:
        return kv.unflatten(0, (-1, self.run.heads)).squeeze(4).permute(0, 2, 3, 1, 4)

    def attend(self, query, mask, scaling, softcap=0.0, sinks=None) -> torch.Tensor:
        batch = len(query)
        if sinks is not None:
            sinks = sinks.view(self.run.heads, -1).repeat(batch, 1)
        out = super().attend(apart(query, self.run.heads), rows_of(mask, self.run.heads), scaling, softcap, sinks)
        return out.unflatten(0, (batch, self.run.heads)).transpose(1, 2).flatten(2, 3)

    def observe(self, queries, keys, mask, scaling) -> None:
        queries, keys = apart(queries, self.run.heads), apart(keys, self.run.heads)
        super().observe(queries, keys, rows_of(mask, self.run.heads), scaling)

    def reorder(self, rows: torch.Tensor) -> None:
        super().reorder((rows[:, None] * self.run.heads + torch.arange(self.run.heads, device=rows.device)).flatten())
