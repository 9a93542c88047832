"""Between a model on a GPU and records in host memory: the query goes to the records, which are far larger.

A decode step brings a token's key, value and query of a layer to the host in one wait; with the mask, once a step; with
the positions selected on the GPU, by codes there, for this query and the one predicted for the next layer, or with that
query. The output goes back without a wait. Where the records are on the GPU, codes and indices are there too, and
nothing crosses, unless a policy selects in host memory: then the mask does.
"""

import time

import torch

from hillinfer.attention import attendable, to_device
from hillinfer.evaluator.policy import each_row
from hillinfer.layer import Layer
from hillinfer.models.later import DeviceTrack, Later

PINNED = 16 << 20  # most bytes to bring through pinned memory, of which torch keeps what it has once taken


class Crossing(Layer):
    """What a model on a GPU is given for a layer."""

    def __init__(self, layer: Layer, device: torch.device):
        self.layer, self.device = layer, device
        self.new: tuple[torch.Tensor, ...] = ()  # a token's keys and values, until its query comes
        self.ahead: tuple = None, None, None, None  # of the next layer: itself, a predicted query, its mask and scaling
        layer.run.later = layer.run.later or Later(device)
        layer.track, layer.device = DeviceTrack(layer.track, layer.run.later), device
        layer.track.away = not layer.run.resident

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if keys.shape[2] > 1:
            self.layer.run.later.attended = None
            self.layer.append(*placed(self.layer, keys, values), there=keys)
        else:
            self.new = keys, values

    def attend(self, query, mask, scaling, softcap=0.0, sinks=None) -> torch.Tensor:
        """See `Layer.attend`."""
        layer, later = self.layer, self.layer.run.later
        if query.shape[2] > 1:
            return layer.attend(query, mask, scaling)
        timed = layer.run.resident or layer.lane == "gpu"
        if timed and layer.index == 0:
            later.settle(wait=False)
        if timed and later.attended is not None:
            layer.track.since(later.attended, "dense")
        if layer.run.resident:
            layer.append(*self.new)
            out = layer.attend(query, mask if layer.chooses else bring(layer, mask)[0], scaling, softcap, sinks)
        else:
            out = to_device(self._attend_here(layer, query, mask, scaling, softcap, sinks), self.device)
        if timed:
            later.attended, layer.run.attended_ns = later.mark(), None
        return out

    def _attend_here(self, layer: Layer, query, mask, scaling, softcap, sinks) -> torch.Tensor:
        (keys, values), (following, guessed, *how), self.ahead = self.new, self.ahead, (None,) * 4
        there, picks, ahead = layer.lane == "gpu", None, None
        if there:
            picks = layer.ask(query, mask, scaling, keys)
        if following is not None and following.lane == "gpu":
            guessed, ahead = None, following.ask(guessed, *how)
        chosen = (part for picked in (picks, ahead) for part in (picked if isinstance(picked, tuple) else (None,) * 2))
        mask, keys, values, query, guessed, sinks, *chosen = bring(
            layer, mask, keys, values, query, guessed, sinks, *chosen
        )
        picks, ahead = (
            picked if part[0] is None else each_row(*part)
            for picked, part in ((picks, chosen[:2]), (ahead, chosen[2:]))
        )
        if following is not None:
            guess(following, guessed, *how, ahead)
        layer.append(keys, values, asked=there)
        return layer.attend(query, mask, scaling, softcap, sinks, picks)

    def everything(self) -> tuple[torch.Tensor, ...]:
        return tuple(to_device(part, self.device) for part in self.layer.everything())


def placed(layer: Layer, *parts: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors of the model where the layer's records are."""
    return to_host(*parts) if layer.track.away else parts


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


def guess(layer: Layer, query: torch.Tensor | None, mask: torch.Tensor | None, scaling: float, picks=None) -> None:
    """`Layer.speculate`, on the host."""
    if picks is None:
        mask, query = bring(layer, mask, query)
    layer.speculate(query, mask, scaling, picks)
