"""Tiny random models of transformers' decoder families: configs shrunk by rule, and by the table in families.toml."""

import dataclasses
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

TABLE = Path(__file__).with_name("families.toml")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = 240  # image and other special tokens begin here; prompts stay below
SOFTCAPS = ("attn_logit_softcapping", "attn_logit_softcap")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
TEXT = ("text", "decoder", "llm", "language")  # a sub-config with none of these in its name is an encoder's


@cache
def table() -> dict[str, Any]:
    """The sizes, and the overrides by family."""
    read = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    overrides: dict[str, dict] = {}
    for entry in read["override"]:
        for name in entry.pop("families").split():
            overrides[name] = _merged(overrides.get(name, {}), entry)
    return {"sizes": read["sizes"], "overrides": overrides}


def _merged(base: dict, more: dict) -> dict:
    both = {key for key in base.keys() & more.keys() if isinstance(base[key], dict)}
    return base | more | {key: _merged(base[key], more[key]) for key in both}


def names() -> list[str]:
    """Every family of the installed transformers that generates text, and the variants of the table."""
    registered = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]
    variants = [name for name in table()["overrides"] if "@" in name]
    return sorted({*registered, *variants})


def build(name: str, seed: int = 7) -> PreTrainedModel:
    """A tiny float32 model of that family, in eval mode. Whatever transformers raises if it cannot be built."""
    family = name.partition("@")[0]
    config = tiny_config(CONFIG_MAPPING[family](), table()["overrides"].get(name, {}))
    kind = AutoModelForCausalLM if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForMultimodalLM
    torch.manual_seed(seed)
    model = kind.from_config(config).eval().float()
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


def tiny_config(default: PretrainedConfig, override: dict, encoder: bool = False) -> PretrainedConfig:
    """A config like `default`, shrunk. `encoder`: of images or sound, whose layers are two."""
    kind = type(default)
    fields = {field.name for field in dataclasses.fields(kind)}
    chosen = dict(_shrunk(default, fields, encoder))
    for name, sub in ((name, getattr(default, name, None)) for name in kind.sub_configs):
        if sub is not None:
            chosen[name] = tiny_config(sub, override.get(name, {}), not any(word in name for word in TEXT))
    plain = {name: value for name, value in override.items() if name not in chosen or not isinstance(value, dict)}
    chosen |= dict.fromkeys(plain.pop("none", ())) | plain
    if plain.get("layer_types"):
        chosen |= {name: len(plain["layer_types"]) for name in DEPTHS if name in fields - plain.keys()}
    return kind(**chosen)


def _shrunk(default: PretrainedConfig, fields: set[str], encoder: bool) -> Iterator[tuple[str, Any]]:
    """The fields that are shrunk by rule."""
    kept = {"vocab_size", "num_key_value_heads", "max_position_embeddings", "sliding_window"} if encoder else set()
    special = SPECIAL
    for name in sorted(fields - kept):
        now = _value(default, name)
        if name in TOKENS:
            yield name, TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")):
            if isinstance(now, int) and now >= 256:
                yield name, special
                special += 1
        elif name in SOFTCAPS and now is not None:
            yield name, 1.5  # tight enough to matter
        elif encoder and name in ("num_hidden_layers", "num_layers", "depth"):
            yield name, 2
        elif name in ("num_key_value_heads", "num_kv_heads") and (now is None or "kv_lora_rank" in fields):
            if now is not None:
                yield name, table()["sizes"]["num_attention_heads"]  # latent attention expands to as many as heads
        elif name in table()["sizes"] and not isinstance(now, list | tuple | dict):
            yield name, table()["sizes"][name]
    kinds = list(dict.fromkeys(_value(default, "layer_types") or ()))
    if kinds and "layer_types" in fields and not encoder:
        depth = 4 if len(kinds) <= 2 else 2 * len(kinds)
        yield "layer_types", (kinds * depth)[:depth]
        yield from ((name, depth) for name in DEPTHS if name in fields)


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a property that this config cannot answer, such as one head_dim for layers of several
        return None


@torch.no_grad()
def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights that make attention and logits vary, so that a wrong token shows: initial ones are close to uniform."""
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "sink" in name:
            parameter.copy_(noise + 1.0)
        elif parameter.dim() >= 2 and "A_log" not in name and last not in ("dt_bias", "D"):
            embedding = any(word in name for word in ("embed", "wte", "wpe"))
            fan = parameter.shape[-1] if parameter.dim() == 2 else max(parameter.shape[1:])
            parameter.copy_(noise * (0.6 if embedding else 1.2 / fan**0.5))
        elif last == "bias" and parameter.dim() == 1:
            parameter.copy_(noise * 0.1)
