"""Between a model on a GPU and records in host memory: the query goes to the records, which are far larger.

A decode step brings a token's key, value and query of a layer to the host in one wait, with the mask, once a step, and
the query predicted for the next layer; where key codes are in the GPU's memory (`Away`), with the positions selected
there for both. The output goes back without a wait. Where the records are on the GPU, codes and indices are
there too, and nothing crosses, unless a policy selects in host memory: then the mask does.
"""

import time
from functools import partial

import torch

from hillinfer.attention import attendable, padded, to_device
from hillinfer.layer import Layer
from hillinfer.models import device_codes
from hillinfer.models.away import Away, suits
from hillinfer.models.later import DeviceTrack, Later

PINNED = 16 << 20  # most bytes to bring through pinned memory, of which torch keeps what it has once taken


class Crossing(Layer):
    """What a model on a GPU is given for a layer."""

    def __init__(self, layer: Layer, device: torch.device):
        self.layer, self.device = layer, device
        self.new: tuple[torch.Tensor, ...] = ()  # a token's keys and values, until its query comes
        self.ahead: tuple = None, None, None, None  # of the next layer: itself, a predicted query, its mask and scaling
        layer.run.later = layer.run.later or Later(device)
        layer.track, layer.open_codes = DeviceTrack(layer.track, layer.run.later), device_codes.open_codes

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if keys.shape[2] > 1:
            self.layer.run.later.attended = None
            self.layer.append(*placed(self.layer, keys, values))
        else:
            self.new = keys, values

    def attend(self, query, mask, scaling, softcap=0.0, sinks=None) -> torch.Tensor:
        """See `Layer.attend`."""
        layer, (following, guessed, *how) = self.layer, self.ahead
        if query.shape[2] > 1:
            return layer.attend(query, mask, scaling)
        (keys, values), self.new, self.ahead = self.new, (), (None,) * 4
        if layer.seen:
            layer.store.step = mask, following and foreseen(following, guessed, *how)
        if layer.run.resident or layer.seen:
            return self._attend_there(layer, layer.run.later, keys, values, query, mask, scaling, softcap, sinks)
        mask, keys, values, query, guessed, sinks = bring(layer, mask, keys, values, query, guessed, sinks)
        if following is not None:
            guess(following, guessed, *how)
        layer.append(keys, values)
        return to_device(layer.attend(query, mask, scaling, softcap, sinks), self.device)

    def _attend_there(self, layer: Layer, later: Later, keys, values, query, mask, *how) -> torch.Tensor:
        if layer.index == 0:
            later.settle(wait=False)
        if later.attended is not None:
            layer.track.since(later.attended, "dense")
        layer.append(keys, values)
        out = layer.attend(query, mask if layer.chooses else bring(layer, mask)[0], *how)
        later.attended, layer.run.attended_ns = later.mark(), None
        return out

    def everything(self) -> tuple[torch.Tensor, ...]:
        return tuple(to_device(part, self.device) for part in self.layer.everything())


def placed(layer: Layer, *parts: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors of the model where the layer takes them."""
    layer.track.away = parts[0].device.type != "cpu" and not layer.run.resident
    if layer.track.away and layer.store is None and suits(layer, parts[0]):
        layer.seen = partial(Away, bring, layer)
    return to_host(*parts) if layer.track.away and not layer.seen else parts


def to_host(*parts: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors in host memory; what comes from another device comes in one wait."""
    far = [part.device for part in parts if part is not None and part.device.type != "cpu"]
    out = [part if part is None else part.to("cpu", non_blocking=part.nbytes <= PINNED) for part in parts]
    if far:
        torch.accelerator.current_stream(far[0]).synchronize()
    return out


def bring(layer: Layer, mask: torch.Tensor | None, *parts: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The mask, bool (B or 1, 1, 1, N), and tensors in host memory, in one wait. The mask crosses once a step."""
    run, start, (known, shown) = layer.run, time.perf_counter_ns(), layer.run.mask
    if mask is not known:
        shown = None if mask is None else attendable(mask)
    found = to_host(shown, *parts)
    # not kept beyond the last layer: a next step's may be the same tensor
    run.mask = (mask, found[0]) if layer.index < run.layers - 1 else (None, None)
    if parts and parts[0].device.type != "cpu":
        layer.track.add("link", "wait", start, sum(part.nbytes for part in parts if part is not None))
    return found


def foreseen(layer: Layer, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> tuple | None:
    """A layer, a predicted query, its mask and scaling, and the selection for it on the model's device."""
    if not layer.seen:
        return None
    query = padded(query, layer.store.geometry.head_dim)
    picks = layer.select(query, layer._valid(mask, len(query)), scaling, "guess", float(layer.run.trial.on))
    return layer, query, mask, scaling, picks


def guess(layer: Layer, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
    """`Layer.speculate`, on the host."""
    mask, query = bring(layer, mask, query)
    layer.speculate(query, mask, scaling)
