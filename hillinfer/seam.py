"""The seam with transformers: the registered attention function, the query probe, and what models are supported.

A decode step of one token gets the layer object itself in place of keys and values, and the registered attention
function asks it to attend. Any other attention implementation then fails at once instead of reading wrong tensors. A
step of several tokens (prefill, a new turn) is exact: it gets tensors where all are at hand, else the layer as well.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hillinfer.errors import UsageError
from hillinfer.layer import Layer

ATTENTION = "hillinfer"


class QueryCaptured(Exception):
    """Control flow, not an error: aborts the probe's forward pass once the query is known.

    Carries the query (B, H, 1, D), its mask and its scaling out of the decoder layer.
    """


class QueryProbe:
    """Takes a cache's place in a decoder layer's forward pass, to capture its query."""

    def update(self, key_states, value_states, *args, **kwargs):
        return self, self


def probe_query(decoder_layer: torch.nn.Module, args: tuple, kwargs: dict) -> QueryCaptured:
    """The query that a decoder layer forms from this input: its own forward pass, aborted where attention begins.

    Exact for any family, since no layer is rewritten: given the layer's true input it is its true query to the bit.
    """
    try:
        decoder_layer.forward(*args, **(kwargs | {"past_key_values": QueryProbe()}))  # forward: hooks do not run again
    except QueryCaptured as captured:
        return captured
    raise UsageError(f"{type(decoder_layer).__name__} never reached attention; turn lookahead off")


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The registered attention function: a `Layer` in place of keys attends itself; tensors go to SDPA."""
    if isinstance(key, Layer | QueryProbe) and scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(key, QueryProbe):
        raise QueryCaptured(query, attention_mask, scaling)
    if hasattr(key, "watcher"):
        key.watcher.observe(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if not isinstance(key, Layer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    odd = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if odd:
        raise UsageError(
            f"{type(module).__name__} uses {', '.join(odd)}, which tiered attention does not have; use the full cache"
        )
    return key.attend(query, attention_mask, scaling), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it left padding is silently ignored


def enable(model: PreTrainedModel) -> str:
    """Switch a model to tiered attention. Returns its previous attention implementation, for `disable`."""
    check_supported(model.config)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise UsageError(
            f"{type(model).__name__} cannot change its attention function; "
            "use a family that can (Llama, Qwen, Mistral, OPT)"
        )
    return before


def disable(model: PreTrainedModel, before: str = "sdpa") -> None:
    """Switch a model back to another attention implementation."""
    model.set_attn_implementation(before)


def check_supported(config: PretrainedConfig) -> list[int]:
    """Indices of the layers that can be tiered. UsageError for a family that does not fit the seam."""
    if config.is_encoder_decoder or getattr(config, "is_decoder", True) is False:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "an encoder"
        raise UsageError(f"{config.model_type} is {kind} model; tiered KV needs a decoder-only one, such as Llama")
    tiered = [i for i, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]
    if not tiered:
        raise UsageError(
            f"every layer of this {config.model_type} model attends to a sliding window only, so its KV stays small "
            "and there is nothing to tier; use its own cache, or a model with full attention"
        )
    return tiered
