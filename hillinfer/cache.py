"""`TieredCache`, a transformers cache over the tiers, and its layers."""

import copy
import weakref

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import hillinfer
from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.evaluator.policies import Full, TopK
from hillinfer.evaluator.policy import Policy
from hillinfer.heads import HeadsLayer
from hillinfer.layer import Layer
from hillinfer.models.layers import TieredLayer, exact_layer
from hillinfer.models.lookahead import look_ahead
from hillinfer.models.seam import install
from hillinfer.models.support import Support, check_selects, check_supported
from hillinfer.run import Run
from hillinfer.timeline import Counters, Timeline


def chunk_ends(n: int, chunk: int | None) -> list[int]:
    """Boundaries of a chunked prefill of n tokens. Never a chunk of one token, which would be a decode step."""
    return [0, *(range(chunk, n - 1, chunk) if chunk else ()), n]


class TieredCache(Cache):
    """A cache for `model.generate(..., past_key_values=cache)` over device, host memory and a drive.

    Layers with a sliding window or other state keep transformers' own cache. `close()`, leaving a
    `with` block, or garbage collection frees the drive's space. `make_cache` opens the named systems.
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
        settings = settings or Settings()
        self.support = Support([], len(layers)) if sliding_ok and only_sliding else check_supported(config)
        check_selects(self.support, config, policy.selects, settings.alpha)
        policy = Full if self.support.exact else policy
        self.config, self.run = config, run(settings, len(self.support.tiered), policy)
        kind = HeadsLayer if policy.per_head and self.run.settings.selects_apart else Layer
        for order, index in enumerate(self.support.tiered):
            layer = kind(order, policy(), self.run)
            layers[index] = exact_layer(layers[index], layer) if self.support.exact else TieredLayer(layer)
        super().__init__(layers=layers)
        self.hooks: list = []
        weakref.finalize(self, _release, self.run, self.hooks)

    @property
    def tiered(self) -> list[Layer]:
        """The layers whose KV is tiered, in order."""
        return [layer.layer for layer in self.layers if isinstance(layer, TieredLayer)]

    @property
    def timeline(self) -> Timeline:
        self.run.later and self.run.later.settle()
        return self.run.timeline

    @property
    def counters(self) -> Counters:
        self.run.later and self.run.later.settle()
        return self.run.counters

    def attach(self, model: PreTrainedModel) -> None:
        """Look one layer ahead in each decode step, by hooks on the model's decoder layers until `close`."""
        self.hooks += look_ahead(self, model)

    def why_split(self) -> str:
        """Where the KV is and why, in one line; and which layers are not tiered."""
        codes = "; key codes in GPU memory" if any(layer.seen for layer in self.tiered) else ""
        rest = f"; {self.support}" if len(self.support.tiered) < self.support.layers else ""
        return self.run.why_split() + codes + rest

    def explain(self, step: int | None = None):
        """Why a decode step took as long as it did, or where the run's time went: `hillinfer.explain`."""
        return hillinfer.explain(self, step)  # the public name: loads the workbench on first use

    def memory(self) -> dict[str, int]:
        """Bytes now: `device` and `host` records, key `codes` (`device` where a GPU has them and no records), `hits`
        tables, tensors bound to the `page_cache`, and space reserved on the `drive`.
        """
        total = dict.fromkeys(("device", "host", "codes", "hits", "page_cache"), 0)
        for layer in self.tiered:
            for kind, nbytes in layer.memory().items():
                held = {"device": "host", "codes": "device" if layer.seen else "codes"} if layer.track.away else {}
                total[held.get(kind, kind)] += nbytes
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
        _release(self.run, self.hooks)

    def __enter__(self) -> "TieredCache":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __deepcopy__(self, memo: dict) -> "TieredCache":
        """An independent cache of the same tokens, in memory: prefill once, ask often. UsageError on a drive."""
        run, new = self.run, object.__new__(type(self))
        run.later and run.later.settle()
        if run.settings.drive is not None:
            raise UsageError("a cache on a drive cannot be copied: save_session once, and open_session for each copy")
        memo |= {id(self): new, id(run.owner): type(run.owner)(run.layers), id(self.hooks): []}
        memo |= {id(shared): shared for shared in (self.config, run.observer)}
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce_ex__(self, protocol):
        raise UsageError("a cache cannot be pickled: keep its document with save_session, or use copy.deepcopy")


def _release(run: Run, hooks: list) -> None:
    run.stop()
    while hooks:
        hooks.pop().remove()
