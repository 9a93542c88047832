"""A forward pass as a hook sees it: whether its KV is a function of token ids alone, and the pass without its first."""

import torch

SLICED = {"position_ids", "cache_position"}  # one entry for each token of the pass, in the last dimension
KNOWN = SLICED | {"input_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
OUTPUTS = {"output_attentions", "output_hidden_states"}  # of all tokens


def ids_of(args: tuple, kwargs: dict) -> torch.Tensor | None:
    return args[0] if args else kwargs.get("input_ids")


def why_not(model: torch.nn.Module, args: tuple, kwargs: dict) -> str:
    """Why the KV of this pass may depend on more than one row of token ids; empty if it does not."""
    ids, mask = ids_of(args, kwargs), kwargs.get("attention_mask")
    if ids is None or ids.dim() != 2 or len(args) > 1:
        return "it does not consist of input_ids"
    if len(ids) > 1:
        return "it has several sequences, and a prefix is that of one: prefill them one by one"
    if odd := [name for name, value in kwargs.items() if value is not None and name not in KNOWN | OUTPUTS]:
        return f"it has more than token ids: {', '.join(odd)}"
    if mask is not None and (mask.dim() != 2 or mask.shape[1] < ids.shape[1] or not mask.all()):
        return "its mask hides tokens, and a prefix has no padding"
    return "the model is in training mode: call model.eval()" if model.training else ""


def computed(kwargs: dict) -> int | None:
    """The last tokens that a pass must compute: those whose logits it returns; None for all.

    Two at least: a single one would be a decode step.
    """
    kept = kwargs.get("logits_to_keep")
    if not isinstance(kept, int) or kept < 1 or any(kwargs.get(name) for name in OUTPUTS):
        return None
    return max(2, kept)


def without_first(n: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a pass whose first n tokens the cache has taken in already. The mask is that of all tokens."""
    short = {name: part[..., n:] for name, part in kwargs.items() if name in SLICED and part is not None}
    ids = ids_of(args, kwargs)[:, n:]
    return ((ids,), kwargs | short) if args else ((), kwargs | short | {"input_ids": ids})
