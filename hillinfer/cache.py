"""`TieredCache`, a transformers cache over the tiers, and its layers."""

import copy
import warnings
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.evaluator.policies import TopK
from hillinfer.evaluator.policy import Policy
from hillinfer.layer import Layer
from hillinfer.run import Run
from hillinfer.seam import check_supported, install, probe_query
from hillinfer.timeline import Counters, Timeline


def chunk_ends(n: int, chunk: int | None) -> list[int]:
    """Boundaries of a chunked prefill of n tokens. Never a chunk of one token, which would be a decode step."""
    return [0, *(range(chunk, n - 1, chunk) if chunk else ()), n]


class TieredLayer(CacheLayerMixin):
    """A `Layer` in the form that transformers expects."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def lazy_initialization(self, key_states, value_states) -> None:
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.is_initialized = True
        first = self.layer.n == 0
        self.layer.append(key_states, value_states)
        if key_states.shape[2] == 1 or (not first and self.layer.in_parts):
            return self.layer, self.layer
        keys, values = (key_states, value_states) if first else self.layer.everything()
        keys.tiered = True  # the attention function refuses what a later step could not do
        if self.layer.policy.watches:
            keys.watcher = self.layer  # the attention function shows it the queries
        return keys, values

    def fill(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        """Append keys and values computed elsewhere: see `Layer.append`."""
        self.is_initialized = True
        self.layer.append(keys, values, kv)

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
        self.layer.crop(self.layer.n + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove)
        if self.layer.index == self.layer.run.layers - 1:
            self.layer.run.owner.free()

    def reset(self) -> None:
        self.layer.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.layer.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.layer.n:
            self.layer.reorder(torch.arange(self.layer.store.geometry.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.layer.reorder(indices)


class TieredCache(Cache):
    """A cache for `model.generate(..., past_key_values=cache)` over device, host memory and a drive.

    Layers with a sliding window or other state keep transformers' own cache. `close()`,
    leaving a `with` block, or garbage collection frees the drive's space. `make_cache` opens the named systems.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        policy: type[Policy] = TopK,
        settings: Settings | None = None,
        sliding_ok: bool = False,
        run: type[Run] = Run,
    ):
        install(config)
        layers = DynamicCache(config=config).layers
        only_sliding = all(getattr(layer, "is_sliding", False) for layer in layers)
        tiered = [] if sliding_ok and only_sliding else check_supported(config)
        self.config, self.run = config, run(settings or Settings(), len(tiered), policy)
        for order, index in enumerate(tiered):
            layers[index] = TieredLayer(Layer(order, policy(), self.run))
        super().__init__(layers=layers)
        self._hooks: list = []
        weakref.finalize(self, _release, self.run, self._hooks)

    @property
    def tiered(self) -> list[Layer]:
        """The layers whose KV is tiered, in order."""
        return [layer.layer for layer in self.layers if isinstance(layer, TieredLayer)]

    @property
    def timeline(self) -> Timeline:
        return self.run.timeline

    @property
    def counters(self) -> Counters:
        return self.run.counters

    def attach(self, model: PreTrainedModel) -> None:
        """Look one layer ahead in each decode step, by hooks on the model's decoder layers until `close`.

        The residual stream changes slowly, so a layer's input predicts the next layer's query, whose tokens are then
        prefetched while this layer computes (InfiniGen's rehearsal; HillInfer APP).
        """
        blocks = _blocks(model, len(self.layers))
        if not blocks:
            self.run.settings = replace(self.run.settings, lookahead=False)
            warnings.warn(f"no looking ahead: {type(model).__name__} has no list of decoder layers", stacklevel=3)
        weak, seen = weakref.ref(self), {}
        for index, block in enumerate(blocks):
            hook = partial(_look_ahead, weak, blocks, index, seen)
            self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    def use(self, policy: type[Policy], settings: Settings) -> None:
        """Continue with another policy, alpha or window over the same KV, which stays where it is."""
        precision = self.run.settings.precision
        for layer in self.tiered:
            if layer.n and policy.needs_codes and layer.codes is None:
                raise UsageError(f"{policy.__name__} needs key codes, which this cache was started without")
            if layer.n and policy.needs_codes and settings.precision != precision:
                raise UsageError(f"keys are coded in {precision} here, not {settings.precision}")
            if layer.n and not policy.late:
                raise UsageError(f"{policy.__name__} must see the prefill: give it a cache of its own")
            layer.take_over(policy())
        changed = dict(alpha=settings.alpha, sinks=settings.sinks, recent=settings.recent)
        self.run.settings = replace(self.run.settings, **changed)

    def fill(self, source: DynamicCache, device: torch.device, chunk: int | None = None) -> None:
        """Copy the KV of an ordinary cache of this model, to the bit as a (chunked) prefill on `device` would leave it.

        A policy that watches the prefill must have been shown the source's (`Prefilled`).
        """
        for start, end in pairwise(chunk_ends(source.get_seq_length(), chunk)):
            for layer, other in zip(self.layers, source.layers, strict=True):
                if isinstance(layer, TieredLayer):
                    layer.fill(*(part[:, :, start:end].to(device) for part in (other.keys, other.values)))
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, TieredLayer):  # a sliding window has dropped its past: copy its state
                self.layers[index] = copy.deepcopy(source.layers[index])
                continue
            for policy in getattr(source, "learned", {}).get(index, ()):
                if type(policy) is type(layer.layer.policy):
                    layer.layer.policy = copy.deepcopy(policy)

    def memory(self) -> dict[str, int]:
        """Bytes now: `device` and `host` records, key `codes`, `hits` tables, tensors bound to the `page_cache`, and
        space reserved on the `drive`.
        """
        total = dict.fromkeys(("device", "host", "codes", "hits", "page_cache"), 0)
        for layer in self.tiered:
            for kind, nbytes in layer.memory().items():
                total[kind] += nbytes
        total["hits"] += self.run.hits.nbytes if self.run.hits else 0
        return total | {"drive": self.run.drive_bytes}

    def reset(self) -> None:
        """Forget all tokens and free the drive's space."""
        fresh = DynamicCache(config=self.config).layers  # some releases cannot reset their sliding layers
        for index, layer in enumerate(self.layers):
            if isinstance(layer, TieredLayer):
                layer.reset()
            else:
                self.layers[index] = fresh[index]
        self.run.stop()

    def close(self) -> None:
        """Free memory, threads, hooks and the drive's space. The record of the run stays."""
        self.reset()
        _release(self.run, self._hooks)

    def __enter__(self) -> "TieredCache":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __deepcopy__(self, memo: dict) -> "TieredCache":
        """An independent cache of the same tokens, in memory: prefill once, ask often. UsageError on a drive."""
        run, new = self.run, object.__new__(type(self))
        if run.settings.drive is not None:
            raise UsageError(
                "a cache on a drive cannot be copied: keep its document with save_session once, and open it with "
                "open_session for each copy"
            )
        memo |= {id(self): new, id(run.owner): type(run.owner)(run.layers), id(self._hooks): []}
        memo |= {id(shared): shared for shared in (self.config, run.observer)}
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce_ex__(self, protocol):
        raise UsageError(
            "a cache cannot be pickled: keep its document with save_session, or copy a cache in memory by copy.deepcopy"
        )


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
    if index + 1 == len(blocks):
        seen.clear()
    elif seen and isinstance(following := cache.layers[index + 1], TieredLayer) and following.layer.looks_ahead:
        given = ((hidden, *seen["args"]), seen["kwargs"]) if args else ((), seen["kwargs"] | {"hidden_states": hidden})
        try:
            following.layer.speculate(*probe_query(blocks[index + 1], *given).args)
        except Exception as error:
            cache.run.stop_guessing(error)


def _release(run: Run, hooks: list) -> None:
    run.stop()
    while hooks:
        hooks.pop().remove()
