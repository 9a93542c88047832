"""Write a GGUF file as llama.cpp's converter does: two layers of Llama, and a tokenizer of bytes."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|end|>"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=259, max_position_embeddings=512)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=258, bos_token_id=None)
    return LlamaForCausalLM(config).eval()


def write(path: Path, model: LlamaForCausalLM, kind: str = "F32", arch: str = "llama", drop=(), **keys) -> Path:
    """The file, with matrices of ggml's type `kind`, without keys and tensors whose names begin with those of `drop`.

    keys  more keys of the file, dots written as `__`
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer, config = GGUFWriter(path, arch), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*bytes_to_unicode().values(), "th", "the", END])
    writer.add_token_types([1] * 258 + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(258)
    for key, value in keys.items():
        add = {str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_uint16)
        add(key.replace("__", "."), value)
    for key in [key for key in writer.kv_data[0] if key.startswith(tuple(drop))]:
        del writer.kv_data[0][key]
    for name, weight in model.state_dict().items():
        name, array = _gguf_name(name), _permuted(name, weight, config).numpy()
        if name.startswith(tuple(drop)):
            continue
        quantised = GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, np.ascontiguousarray(quantize(array, quantised)), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _permuted(name: str, weight: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp wants them: the two halves of a head take turns."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
