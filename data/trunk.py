"""Llama forward pass for training, on the weights of a transformers LlamaForCausalLM.

transformers' own forward interprets skipped position ids as packed sequences and splits the text there.
"""

import torch
import torch.nn.functional as F


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), 1e-5)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def linear(x: torch.Tensor, module) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, module.weight.to(x.dtype), bias)


def angles(positions: torch.Tensor, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = theta ** (-torch.arange(32, dtype=torch.float32) / 32)
    turn = positions[..., None].float() * frequency  # (B, n, 32)
    turn = torch.cat((turn, turn), -1)[:, None]  # (B, 1, n, 64)
    return turn.cos(), turn.sin()


def trunk(model, ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype=torch.bfloat16) -> torch.Tensor:
    """Final hidden states (B, n, d)."""
    x = model.model.embed_tokens(ids)
    batch, n = ids.shape
    cos, sin = cos.to(dtype), sin.to(dtype)
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        h = norm(x, layer.input_layernorm.weight).to(dtype)
        q = rotate(linear(h, a.q_proj).view(batch, n, 8, 64).transpose(1, 2), cos, sin)
        k = rotate(linear(h, a.k_proj).view(batch, n, 4, 64).transpose(1, 2), cos, sin)
        v = linear(h, a.v_proj).view(batch, n, 4, 64).transpose(1, 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(o.transpose(1, 2).reshape(batch, n, 512), a.o_proj).float()
        h = norm(x, layer.post_attention_layernorm.weight).to(dtype)
        x = x + linear(F.silu(linear(h, m.gate_proj)) * linear(h, m.up_proj), m.down_proj).float()
    return norm(x, model.model.norm.weight)
