"""One prefill for several systems: an ordinary cache that `TieredCache.fill` copies from."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PretrainedConfig

from hillinfer.attention import attendable
from hillinfer.evaluator.policy import Policy
from hillinfer.seam import check_supported


@dataclass
class Watcher:
    """Shows policies a pass of several tokens; `seconds` counts what each takes for it."""

    policies: list[Policy]
    seconds: dict[type[Policy], float]

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
        valid = None if mask is None else attendable(mask)[:, 0, -1].expand(len(queries), -1)
        for policy in self.policies:
            start = time.perf_counter()
            policy.observe(queries, keys, valid, scaling)
            self.seconds[type(policy)] += time.perf_counter() - start


class Prefilled(DynamicCache):
    """An ordinary cache for `TieredCache.fill` to copy from, in host memory after `rest`.

    Policies that look at the prefill are shown this one, one of each kind in each layer; `fill` copies what they
    learned.
    """

    def __init__(self, config: PretrainedConfig, policies: Iterable[type[Policy]] = ()):
        super().__init__(config=config)
        self.seconds = dict.fromkeys(policies, 0.0)  # that looking took, by kind
        self.learned = {index: [kind() for kind in self.seconds] for index in check_supported(config)}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        policies, first = self.learned.get(layer_idx, ()), self.get_seq_length(layer_idx) == 0
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for policy in policies:
            if first:
                policy.start(*key_states.shape[:2], key_states.shape[3])
            policy.append(key_states)
        if policies:
            keys = keys.view(keys.shape)  # the watcher is for this pass, and the layer keeps its tensor
            keys.watcher = Watcher(policies, self.seconds)
        return keys, values

    def rest(self) -> "Prefilled":
        """Move what will be copied to host memory. Layers that stay ordinary are copied as they are."""
        for layer in (self.layers[index] for index in self.learned):
            layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
        return self
