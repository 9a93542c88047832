"""A model's shape, window and plan follow from its config alone, whatever the family calls its fields."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from hillinfer import Settings, UsageError
from hillinfer.systems.planning import plan
from hillinfer.systems.shapes import shape_of, window_of

FAMILIES = "GPT2 GPTJ GPTNeoX GPTBigCode OPT Bloom Falcon Mpt Jamba Mixtral Qwen2Moe Qwen3Moe DeepseekV3 GptOss "
FAMILIES += "Llama4Text Gemma3Text Gemma3nText Gemma4Text Glm4Moe Ernie4_5_Moe Qwen3_5MoeText Starcoder2 Phi3 Cohere2"


def config_of(family: str):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip("not in this transformers")
    return getattr(transformers, f"{family}Config")()


def parameters(shape) -> float:
    return shape.weight_bytes / shape.width


@pytest.mark.parametrize("family", FAMILIES.split())
def test_parameters_are_those_of_the_model(family):
    config = config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    tied = shape.head_weights if config.tie_word_embeddings else 0
    assert parameters(shape) - tied == pytest.approx(model.num_parameters(), rel=0.1)
    assert shape.kv_heads * shape.head_dim > 0


def test_all_experts_are_stored_and_a_few_compute():
    qwen = Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, moe_intermediate_size=768, num_experts=128)
    mixtral = MixtralConfig()
    assert parameters(shape_of(qwen)) == pytest.approx(30.5e9, rel=0.01)
    assert parameters(shape_of(mixtral)) == pytest.approx(46.7e9, rel=0.01)
    assert shape_of(mixtral).inner == 2 * 14336 and shape_of(qwen).inner == 8 * 768


def test_a_layer_that_is_tiered_gives_the_shape():
    assert shape_of(config_of("Gemma4Text")).head_dim == 512  # of full attention; sliding layers have 256


@pytest.mark.parametrize("family", [*FAMILIES.split(), "Dbrx", "Gemma3", "Zamba2", "NemotronH", "Mamba"])
def test_a_plan_is_made_or_refused_but_never_a_traceback(family, tmp_path):
    try:
        need = plan(config_of(family), Settings(drive=tmp_path), 64, torch.bfloat16, 16)
    except UsageError:
        return
    assert need > 0


def test_yarn_extends_the_window():
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=2048)
    short = LlamaConfig(max_position_embeddings=2048, rope_parameters=yarn)
    said = LlamaConfig(max_position_embeddings=8192, rope_parameters=yarn)  # the longer one of the two counts
    plain = LlamaConfig(max_position_embeddings=2048)
    assert [window_of(config) for config in (short, said, plain)] == [8192, 8192, 2048]
    with pytest.raises(UsageError, match="window of 2,048"):
        plan(plain, Settings(), 2500, torch.float32)


def test_a_family_without_a_window_has_none():
    assert window_of(transformers.BloomConfig()) is None
