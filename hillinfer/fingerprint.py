"""Digests of what a document's KV depends on: a model's weights, adapters and shape, and a tokenizer's vocabulary."""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import accumulate

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.errors import UsageError

SAMPLE = 16  # values of each weight in a model's fingerprint
# Fields that families declare themselves and that change no KV.
IDLE = re.compile(
    r"use_cache|vocab_size|tie_word_embeddings|pretraining_tp|init_std|initializer_\w+|output_\w+|router_aux_\w+"
    r"|\w+_token_id|\w*dropout|layerdrop"
)
WRAPPERS = re.compile(r"\b(_orig_mod|base_layer|original_module)\.")  # torch.compile's and peft's, in names of weights


def fingerprint(model: PreTrainedModel) -> str:
    """Digest of all that a model computes KV with: the shape in its config, active adapters, a sample of each weight.

    UsageError if weights are not in memory.
    """
    digest = hashlib.sha256(json.dumps(_shape(model.config), sort_keys=True, default=str).encode())
    for name, weight in _weights(model):
        flat = weight.detach().reshape(-1)
        try:
            sample = flat[:: max(1, flat.numel() // SAMPLE)].float().cpu()
        except NotImplementedError:  # offloaded weights lie on "meta"
            raise UsageError(
                f"a session or store tells its model by its weights, and {name} cannot be read: load the model "
                "without offloading (device_map), or leave out the session or store"
            ) from None
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def tokens_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _shape(config: PretrainedConfig) -> dict:
    """The fields that a family declares and that differ from its defaults.

    Thus neither fields of all models nor those that a later release adds (with a default that changes nothing) count.
    """
    config = config.get_text_config(decoder=True)
    default, common = type(config)().to_dict(), PretrainedConfig().to_dict()
    return {"family": config.model_type} | {
        name: value
        for name, value in config.to_dict().items()
        if name in default.keys() - common.keys() and value != default[name] and not IDLE.fullmatch(name)
    }


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under the bare model's names. Of adapters (peft) those that are on, under their number and scaling."""
    adapters = {}  # an adapter's part -> its name here, None if it is off
    for path, module in model.named_modules():
        parts = getattr(module, "adapter_layer_names", ())
        off = not parts or module.disable_adapters or getattr(module, "merged", False)
        on = [] if off else list(module.active_adapters)
        for part in parts:
            for name in getattr(module, part, ()):
                scaling = getattr(module, "scaling", {}).get(name)
                number = f"{path}.{part}.{on.index(name)} x {scaling}" if name in on else None
                adapters[f"{path}.{part}.{name}"] = number
    for name, weight in model.state_dict().items():
        part = next((start for start in accumulate(name.split("."), "{}.{}".format) if start in adapters), None)
        if isinstance(weight, torch.Tensor) and (part is None or adapters[part] is not None):
            yield WRAPPERS.sub("", name if part is None else name.replace(part, adapters[part])), weight
