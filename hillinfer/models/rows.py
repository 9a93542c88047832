"""One decode for many ways: row i of a batch steps the i-th of several caches, and the weights are read once for all.

The caches hold the same tokens and may belong to any systems. From here on each row goes its own way: its tokens, its
selection, its store. Outputs equal those of a decode alone up to the rounding of a batched matrix product.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from transformers.cache_utils import Cache

from hillinfer.errors import UsageError
from hillinfer.layer import Layer
from hillinfer.models.layers import TieredLayer


class RowsLayer(Layer):
    """One decoder layer of several caches, for steps of one token."""

    def __init__(self, layers: list[Layer], ended: torch.Tensor):
        self.layers, self.ended = layers, ended

    @property
    def n(self) -> int:
        return max(layer.n for layer in self.layers)

    def active(self) -> Iterator[tuple[slice, Layer]]:
        for row, (layer, ended) in enumerate(zip(self.layers, self.ended.tolist(), strict=True)):
            if not ended:
                yield slice(row, row + 1), layer

    def append(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        for row, layer in self.active():
            layer.append(keys[row], values[row], kv)

    def attend(self, query, mask, scaling, softcap=0.0, sinks=None) -> torch.Tensor:
        out = None
        for row, layer in self.active():
            own = layer.attend(query[row], None if mask is None else mask[row], scaling, softcap, sinks)
            out = own.new_zeros(len(query), *own.shape[1:]) if out is None else out
            out[row] = own
        return out


class Rows(Cache):
    """The caches of several ways as one cache of a batch. What they do not tier (a sliding window) is kept here.

    ended  (B,) bool; rows that take no further part, and whose caches stay as they are
    """

    def __init__(self, caches: Sequence[Cache]):
        self.ended = torch.zeros(len(caches), dtype=torch.bool, device="cpu")
        layers = []
        for index, layer in enumerate(caches[0].layers):
            if isinstance(layer, TieredLayer):
                layers.append(TieredLayer(RowsLayer([cache.layers[index].layer for cache in caches], self.ended)))
            else:
                layers.append(copy.deepcopy(layer))
                layers[-1].reorder_cache(torch.zeros(len(caches), dtype=torch.long, device="cpu"))
        super().__init__(layers=layers)


def as_batch(caches: Sequence[Cache]) -> Cache:
    """The only cache itself, or all as rows of one batch. UsageError where no selection can serve the attention."""
    if len(caches) > 1 and caches[0].support.exact:
        raise UsageError("the attention of this model takes the keys of one cache: decode one at a time")
    return caches[0] if len(caches) == 1 else Rows(caches)
