"""One prefill shared by several systems: a standard cache that `fill` copies to a `TieredCache`."""

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import DynamicCache, PretrainedConfig

from hillinfer.attention import attendable
from hillinfer.cache import TieredCache, chunk_ends
from hillinfer.evaluator.policy import Policy
from hillinfer.heads import apart, rows_of
from hillinfer.models.layers import TieredLayer
from hillinfer.models.seam import install
from hillinfer.models.support import check_supported


@dataclass
class PolicyObserver:
    """Passes the queries of a multi-token pass to several policies, and times each of them in `seconds`."""

    policies: list[Policy]
    seconds: dict[type[Policy], float]
    apart: bool  # each KV head selects for itself, where a policy can

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
        valid = None if mask is None else attendable(mask)[:, 0, -1].expand(len(queries), -1)
        for policy in self.policies:
            start = time.perf_counter()
            heads = keys.shape[1] if policy.per_head and self.apart else 1
            policy.observe(apart(queries, heads), apart(keys, heads), rows_of(valid, heads), scaling)
            self.seconds[type(policy)] += time.perf_counter() - start


class Prefilled(DynamicCache):
    """A standard cache that `fill` copies to a `TieredCache`.

    Policies that observe the prefill (such as H2O and SnapKV) run here, one instance per policy class and layer. `fill`
    copies their state.

    apart  the caches to fill have KV heads that select for themselves, as they do in memory by default
    """

    def __init__(self, config: PretrainedConfig, policies: Iterable[type[Policy]] = (), apart: bool = True):
        install(config)
        self.apart = apart
        super().__init__(config=config)
        self.seconds = dict.fromkeys(policies, 0.0)  # observation time by policy class
        self.learned = {index: [kind() for kind in self.seconds] for index in check_supported(config).tiered}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        policies, first = self.learned.get(layer_idx, ()), self.get_seq_length(layer_idx) == 0
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for policy in policies:
            own = apart(key_states, key_states.shape[1] if policy.per_head and self.apart else 1)
            if first:
                policy.start(*own.shape[:2], own.shape[3])
            policy.append(own)
        if policies:
            keys = keys.view(keys.shape)  # a view: the observer must not stay on the tensor that the layer keeps
            keys.watcher = PolicyObserver(policies, self.seconds, self.apart)
        return keys, values

    def to(self, device: torch.device | str) -> "Prefilled":
        """Move the layers that `fill` converts: to host memory to keep them, back to the model's to go on."""
        for layer in (self.layers[index] for index in self.learned):
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        return self

    def fill(self, cache: TieredCache, device: torch.device, chunk: int | None = None) -> None:
        """Copy this KV into an empty cache, to the bit as a (chunked) prefill on `device` would leave it.

        A policy that watches the prefill must have been one of this one's.
        """
        pairs = list(zip(cache.layers, self.layers, strict=True))
        for start, end in pairwise(chunk_ends(self.get_seq_length(), chunk)):
            for layer, own in pairs:
                if isinstance(layer, TieredLayer):
                    layer.fill(*(part[:, :, start:end].to(device) for part in (own.keys, own.values)))
        for index, (layer, own) in enumerate(pairs):
            if not isinstance(layer, TieredLayer):  # a sliding window has dropped its past: copy its state
                cache.layers[index] = copy.deepcopy(own)
                continue
            if cache.support.exact:  # what the layer's own class stores beside K and V
                state = {name: value for name, value in vars(own).items() if name not in ("keys", "values")}
                vars(layer).update(copy.deepcopy(state))
            for policy in self.learned.get(index, ()):
                if type(policy) is type(layer.layer.policy):
                    layer.layer.policy = copy.deepcopy(policy)
