"""Look one layer ahead in a model's decode steps: hooks on its decoder layers, and a probe of the next one's query.

The residual stream changes slowly, so a layer's input predicts the next layer's query, whose tokens are prefetched
while this layer computes (InfiniGen's rehearsal; HillInfer APP). A guess that fails turns looking ahead off.
"""

import warnings
import weakref
from functools import partial

import torch

from hillinfer.errors import UsageError
from hillinfer.models.crossing import guess
from hillinfer.models.layers import TieredLayer


class QueryCaptured(Exception):
    """Control flow, not an error: aborts the probe's forward pass once the query is known.

    Carries the query (B, H, 1, D), its mask and its scaling out of the decoder layer.
    """


class QueryProbe:
    """Takes the place of a cache of `n` tokens in a decoder layer's forward pass, to capture its query."""

    def __init__(self, n: int = 0):
        self.n = n

    def get_seq_length(self, *args) -> int:
        return self.n

    def update(self, key_states, value_states, *args, **kwargs):
        return self, self


def probe_query(decoder_layer: torch.nn.Module, args: tuple, kwargs: dict, n: int = 0) -> QueryCaptured:
    """The query that a decoder layer forms from this input: its own forward pass, aborted where attention begins.

    Exact for any family, since no layer is rewritten: given the layer's true input it is its true query to the bit.
    """
    try:
        decoder_layer.forward(*args, **(kwargs | {"past_key_values": QueryProbe(n)}))  # forward: hooks do not run again
    except QueryCaptured as captured:
        return captured
    raise UsageError(f"{type(decoder_layer).__name__} never reached attention; turn lookahead off")


def look_ahead(cache, model: torch.nn.Module) -> list:
    """Hooks, to be removed with the cache; none for a model without a list of decoder layers.

    cache  `TieredCache`; the hooks do not keep it alive
    """
    blocks, weak, seen = _blocks(model, len(cache.layers)), weakref.ref(cache), {}
    if not blocks:
        warnings.warn(f"no looking ahead: {type(model).__name__} has no list of decoder layers", stacklevel=4)
    return [
        block.register_forward_pre_hook(partial(_look_ahead, weak, blocks, index, seen), with_kwargs=True)
        for index, block in enumerate(blocks[:-1])
    ]


def _blocks(model: torch.nn.Module, n: int) -> list[torch.nn.Module]:
    """The model's n decoder layers: its largest list of n modules."""
    lists = [list(part) for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == n]
    return max(lists, key=lambda found: sum(p.numel() for block in found for p in block.parameters()), default=[])


def _look_ahead(weak: weakref.ref, blocks: list, index: int, seen: dict, block, args: tuple, kwargs=None) -> None:
    """Forward pre-hook of a decoder layer: in a decode step on this cache, guess for the following layer.

    seen  what the last tiered layer of this step was called with: in a hybrid, the neighbour's mask and rotary table
          are another kind's
    """
    cache = weak()
    if kwargs is None or cache is None or kwargs.get("past_key_values") is not cache:
        return  # torch drops a removed hook's kwargs flag first: another thread is closing its cache
    hidden = args[0] if args else kwargs.get("hidden_states")
    if hidden is None or hidden.dim() != 3 or hidden.shape[1] != 1:
        return
    if index == 0:
        seen.clear()
    if isinstance(cache.layers[index], TieredLayer):
        own = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "hidden_states")}
        seen.update(args=args[1:], kwargs=own)  # without the cache, which the hooks must not keep alive
    if seen and isinstance(following := cache.layers[index + 1], TieredLayer) and following.layer.looks_ahead:
        given = ((hidden, *seen["args"]), seen["kwargs"]) if args else ((), seen["kwargs"] | {"hidden_states": hidden})
        try:
            found = following.layer, *probe_query(blocks[index + 1], *given, following.layer.n).args
            if crossing := getattr(cache.layers[index], "crossing", None):
                crossing.ahead = found  # the host waits once, for this layer's query and the next one's
            else:
                guess(*found)
        except Exception as error:
            cache.run.stop_guessing(error)
