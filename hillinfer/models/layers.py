"""Layers of the cache in the form that transformers expects; exact ones leave attention to the model's own code."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from hillinfer.errors import UsageError
from hillinfer.layer import Layer
from hillinfer.models.crossing import Crossing, placed


class TieredLayer(CacheLayerMixin):
    """A `Layer` in the form that transformers expects."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    crossing: Crossing | None = None

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def lazy_initialization(self, key_states, value_states) -> None:
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if key_states.dim() != 4 or value_states.dim() != 4:
            raise UsageError(f"keys and values must be (B, Hkv, n, D), not {key_states.shape}, {value_states.shape}")
        self.is_initialized, first, layer = True, self.layer.n == 0, self.seen_from(key_states.device)
        layer.append(key_states, value_states)
        if key_states.shape[2] == 1 or (not first and self.layer.in_parts):
            return layer, layer
        keys, values = (key_states, value_states) if first else layer.everything()
        keys.tiered = True  # the attention function refuses what a later step could not do
        if self.layer.policy.watches:
            keys.watcher = self.layer  # the attention function shows it the queries
        return keys, values

    def seen_from(self, device: torch.device) -> Layer:
        """The layer for a model on this device."""
        if device.type != "cpu" and self.crossing is None:
            self.crossing = Crossing(self.layer, device)
        return self.layer if device.type == "cpu" else self.crossing

    def fill(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        """Append keys and values computed elsewhere: see `Layer.append`."""
        self.is_initialized = True
        self.seen_from(keys.device)  # before there is a store, which keeps the layer's track
        self.layer.append(*placed(self.layer, keys, values, kv))

    def get_seq_length(self, *args) -> int:
        return self.layer.n

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        # Releases before 5.6 pass the positions of the queries and not their number.
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.layer.n + new, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: that many if negative, all but that many if positive (the older form)."""
        kept = self.layer.n + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.layer.crop(max(0, kept))
        if self.layer.index == self.layer.run.layers - 1:
            self.layer.run.owner.free()

    def reset(self) -> None:
        self.layer.reset()
        self.is_initialized, self.crossing = False, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._reorder(lambda rows: rows[beam_idx.to("cpu")])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._reorder(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._reorder(lambda rows: rows[indices.to("cpu")])

    def _reorder(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take the sequences that `choose` picks of all, by number, place from the end or mask."""
        if self.layer.n:
            batch = self.layer.store.geometry.batch // self.layer.run.heads
            try:
                self.layer.reorder(choose(torch.arange(batch, device="cpu")))
            except IndexError as error:
                raise UsageError(f"no such sequences in a batch of {batch}: {error}") from None


class ExactLayer(TieredLayer):
    """A tiered layer for attention that no selection can serve: the model's own code gets all keys and values.

    Records hold a token's K and V of any shapes side by side (for MLA its latents), so that the lossless systems, and
    any other at alpha 1, work for every family. Mixed by `exact_layer` into a layer's own class, which keeps what else
    it stores; its `keys` and `values` stay empty.
    """

    def lazy_initialization(self, *args, **kwargs) -> None:
        super(TieredLayer, self).lazy_initialization(*args, **kwargs)

    def fill(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        """Append keys and values of any shapes."""
        if self.layer.n == 0:
            self.lazy_initialization(keys, values)
            self.keys = self.values = keys.new_empty(len(keys), 1, 0, 0)
            self.is_initialized = True
        rows = torch.cat([part.transpose(1, 2).flatten(2) for part in (keys, values)], -1)  # (B, n, X)
        halves = F.pad(rows, (0, rows.shape[2] % 2)).unflatten(2, (2, 1, -1))  # (B, n, 2, 1, X/2)
        self.layer.append(*placed(self.layer, *halves.permute(2, 0, 3, 1, 4), halves))

    def update(self, key_states, value_states, *args, **kwargs):
        first = self.layer.n == 0
        self.fill(key_states, value_states)
        if first:
            return key_states, value_states
        rows, parts = self.layer.read(key_states.shape[2] == 1).flatten(2).to(key_states.device), []
        for part in (key_states, value_states):
            shape = part.shape[1], part.shape[3]
            own, rows = rows.split((shape[0] * shape[1], rows.shape[2] - shape[0] * shape[1]), 2)
            parts.append(own.unflatten(2, shape).transpose(1, 2).contiguous())
        return tuple(parts)


def _both(name: str):
    """A method of the layer's own class, for what it stores beside K and V, and that of `TieredLayer`."""

    def method(self, *args) -> None:
        getattr(super(TieredLayer, self), name)(*args)
        getattr(TieredLayer, name)(self, *args)

    return method


for _name in ("crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
    setattr(ExactLayer, _name, _both(_name))


def exact_layer(own: CacheLayerMixin, layer: Layer) -> ExactLayer:
    """A layer of `own`'s class whose K and V are tiered."""
    kind = type(f"Exact{type(own).__name__}", (ExactLayer, type(own)), {"_layer_type": None})  # None: not registered
    made = kind.__new__(kind)
    made.__dict__.update(vars(own))
    made.layer = layer
    return made
