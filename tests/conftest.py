"""Tiny random models of all supported families."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other on small machines

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2-mixed": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=24, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=24)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=97,
            hidden_size=96,
            ffn_dim=96,
            word_embed_proj_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ),
}


def seeded(make):
    """A model with seeded random weights of a scale that avoids ties in greedy decoding."""
    torch.manual_seed(7)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="session")
def models():
    """Maps a family name to its model, built once and cached."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = seeded(FAMILIES[name])
        return made[name]

    return get


@pytest.fixture
def prompt():
    torch.manual_seed(11)
    return torch.randint(2, 97, (1, 150))
