"""Which layers of a model can be tiered, and how, from its config alone."""

import inspect
import sys
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hillinfer.errors import UsageError

# Families whose code computes on keys and values, or asks for their shape, after the cache has returned them.
COMPUTE_ON_KV = {"jetmoe", "diffllama", "doge", "git"}
OWN_CACHE = "insists on a cache class of its own"
REFUSED = {  # families that no cache of another class can serve, and why
    **dict.fromkeys(("deepseek_v4", "unlimited_ocr"), OWN_CACHE),
    **dict.fromkeys(
        ("mllama", "mllama_text_model", "glm5_next", "diffusion_gemma", "diffusion_gemma_text"),
        "reads the tensors of transformers' own cache",
    ),
    "mistral_large4": "has layers of records of different sizes",
    "xlstm": "keeps a state of fixed size",
}


@dataclass(frozen=True)
class Support:
    """The layers of a model that are tiered, by index, of all its `layers`.

    exact    why only attention over all tokens is possible, by the model's own code; None where a selection is as well
    latents  values that a token's record holds in place of keys and values (MLA); 0 elsewhere
    more     True if tiered layers keep more than records, such as an indexer's keys
    """

    tiered: list[int]
    layers: int
    exact: str | None = None
    latents: int = 0
    more: bool = False

    def __str__(self) -> str:
        few = f"{len(self.tiered)} of {self.layers} layers are tiered"
        return few + "; the others keep a window or a state of fixed size" * (len(self.tiered) < self.layers)


def check_supported(config: PretrainedConfig) -> Support:
    """UsageError, with the reason, for a family whose KV cannot be tiered."""
    kind, text = _model_class(config), config.get_text_config(decoder=True)
    if config.is_encoder_decoder or _encodes(text, kind):
        what = "an encoder-decoder" if config.is_encoder_decoder else "an encoder"
        raise UsageError(f"{config.model_type} is {what} model; tiered KV needs a decoder-only one, such as Llama")
    if why := REFUSED.get(text.model_type) or REFUSED.get(config.model_type) or _own_cache(kind):
        raise UsageError(f"{text.model_type} {why}, which cannot be tiered; use its own cache")
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # of its config's own
        raise UsageError(
            f"transformers has no cache for {config.model_type} ({type(error).__name__}: {error})"
        ) from None
    tiered = [i for i, layer in enumerate(layers) if isinstance(layer, DynamicLayer) and not _slides(layer, text)]
    if not tiered:
        slides = any(getattr(layer, "is_sliding", False) for layer in layers)
        why = "attends to a sliding window only" if slides else "keeps a state of fixed size"
        raise UsageError(
            f"every layer of this {config.model_type} model {why}, so its memory stays small and there is nothing to "
            "tier; use its own cache, or a model with full attention"
        )
    kinds = {type(layers[i]) for i in tiered} - {DynamicLayer, DynamicSlidingWindowLayer}
    latents = max(map(_latents, getattr(text, "per_layer_config", None) or (text,)))
    return Support(tiered, len(layers), _why_exact(text, kind, kinds, latents), latents, bool(kinds))


def check_selects(support: Support, config: PretrainedConfig, selects: bool, alpha: float) -> None:
    """UsageError if a policy that `selects` a share `alpha` of the tokens cannot run on this family."""
    if support.exact and selects and alpha < 1:
        raise UsageError(
            f"{config.model_type} {support.exact}, so no tokens can be selected: use full, flexgen or dualblade, "
            "or alpha 1"
        )


def _latents(config: PretrainedConfig) -> int:
    rank = getattr(config, "kv_lora_rank", None)
    return rank + getattr(config, "qk_rope_head_dim", 0) if rank else 0


def _why_exact(text: PretrainedConfig, kind: type | None, kinds: set[type], latents: int) -> str | None:
    if latents:
        return "caches latents that it expands in each step (MLA)"
    if kinds:
        return f"keeps more than keys and values in a layer ({', '.join(sorted(k.__name__ for k in kinds))})"
    if text.model_type in COMPUTE_ON_KV:
        return "computes on the keys and values that the cache returns"
    if kind is not None and hasattr(kind, "_can_set_attn_implementation") and not kind._can_set_attn_implementation():
        return "computes attention by code of its own, not through transformers' AttentionInterface"
    return None


def _own_cache(kind: type | None) -> str | None:
    """Why models of this class take no other cache, by transformers' own answer; None if they do."""
    takes = getattr(kind, "_supports_default_dynamic_cache", None)
    return OWN_CACHE if takes and not takes() else None


def _slides(layer: DynamicLayer, text: PretrainedConfig) -> bool:
    """True for a window that is shorter than the model's context."""
    most = getattr(text, "max_position_embeddings", None) or sys.maxsize
    return getattr(layer, "is_sliding", False) and getattr(layer, "sliding_window", 0) < most


def _encodes(text: PretrainedConfig, kind: type | None) -> bool:
    """True for an encoder: `is_decoder` is False, and the family's code looks at it (GPT-NeoX has the default only)."""
    if getattr(text, "is_decoder", True) or kind is None:
        return False
    return "self.is_decoder" in inspect.getsource(sys.modules[kind.__module__])


def _model_class(config: PretrainedConfig) -> type | None:
    """The class that would be loaded; None for code that is not part of transformers."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    return None
