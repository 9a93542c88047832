"""The seam with transformers: attention functions that hand a query to a `Layer`.

A model keeps its own attention function under its own name. A decode step of one token gets the layer object itself in
place of keys and values, and the registered function asks it to attend; tensors go to the model's own function. A step
of several tokens (prefill, a new turn) is exact: it gets tensors where all are at hand, else the layer as well.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hillinfer.errors import UsageError
from hillinfer.layer import Layer
from hillinfer.models.lookahead import QueryCaptured, QueryProbe
from hillinfer.models.support import check_supported

# Arguments of attention functions that a layer needs not know: without effect in inference, or expressed by the mask.
HARMLESS = {"dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "output_attentions"}
HARMLESS |= {"output_hidden_states", "output_router_logits", "use_cache", "return_dict", "deterministic"}
HARMLESS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "logits_to_keep"}
KNOWN = HARMLESS | {"scaling", "softcap", "s_aux"}


def enable(model: PreTrainedModel) -> str:
    """Let a model's attention functions take a `Layer` for keys. Their names and what they do with tensors stay.

    `make_cache` calls it. Returns the name of the model's attention. UsageError for a family that is not supported.
    """
    check_supported(model.config)
    return install(model.config)


def install(config: PretrainedConfig) -> str:
    """`enable` without the check, from the config alone."""
    used = config.get_text_config(decoder=True)._attn_implementation
    for name in {"sdpa", "eager", used} - {None}:
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        if not (isinstance(function, partial) and function.func is attention):
            AttentionInterface.register(name, partial(attention, function))
    return used


def disable(model: PreTrainedModel, before: str | None = None) -> None:
    """Nothing is left to undo; kept for callers of earlier versions."""


def attention(function: Callable | None, module, query, key, value, attention_mask=None, **kwargs):
    """An attention function, or a module's own eager one for None, that also takes a `Layer` for keys."""
    given, own = kwargs.get("scaling"), isinstance(key, Layer)
    scaling = query.shape[-1] ** -0.5 if given is None else given
    if isinstance(key, QueryProbe):
        raise QueryCaptured(query, attention_mask, scaling)
    if own or hasattr(key, "tiered"):
        odd = [name for name, value in kwargs.items() if value is not None and name not in KNOWN]
        if odd:
            raise UsageError(
                f"{type(module).__name__} passes {', '.join(odd)} to attention, which a selection of tokens does "
                "not have: use system full, flexgen or dualblade"
            )
    if hasattr(key, "watcher"):
        key.watcher.observe(query, key, attention_mask, scaling)
    if own:
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        softcap = None if function is sdpa_attention_forward else softcap  # sdpa has none: early releases drop it
        if query.shape[2] == 1 or (softcap is None and sinks is None):
            return key.attend(query, attention_mask, scaling, softcap or 0.0, sinks), None
        key, value = key.everything()
    return (function or _eager(module))(module, query, key, value, attention_mask, **kwargs)


def _eager(module: torch.nn.Module) -> Callable:
    """The eager attention function of a module's family, which stands beside the code that calls it."""
    forward = inspect.unwrap(type(module).forward)
    for names in (forward.__globals__, *(vars(sys.modules[kind.__module__]) for kind in type(module).__mro__)):
        if (found := names.get("eager_attention_forward")) is not None:
            return found
    raise UsageError(f"{type(module).__name__} has no eager attention function; load the model with sdpa attention")
