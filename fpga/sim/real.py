"""Realistic kernel inputs: keys and queries of the embedded model on one document."""

import functools

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hillinfer.assets import load_embedded
from hillinfer.evaluator.codes import KeyCodes, unpack
from hillinfer.longbench.comparison import demo_records
from hillinfer.longbench.synthetic import prompt_of


@functools.cache
def real_states(task: str = "lines_4k") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer: keys (Hkv, n, D) and the last token's query (H, D), float32, as passed to attention."""
    seen = []

    def record(module, query, key, value, mask, **kwargs):
        seen.append((key[0].float(), query[0, :, -1].float()))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recording", record)
    model, tokenizer = load_embedded()
    before = model.config._attn_implementation
    model.set_attn_implementation("recording")
    ids = tokenizer(prompt_of(demo_records({task: 1})[0]), return_tensors="pt").input_ids
    with torch.inference_mode():
        model(ids)
    model.set_attn_implementation(before)
    return seen


def coded(keys: torch.Tensor, query: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised by the package: keys (Hkv, n, D) int8, query (Hkv, G, D) int8."""
    store = KeyCodes(1, keys.shape[0], keys.shape[2], bits)
    store.append(keys[None])
    return unpack(store.codes.view()[0], bits), store.query(query, 0)[0]


def recall(bits: int, share: float) -> float:
    """Recall of the top `share` tokens by coded scores against exact fp32 scores, mean over query heads."""
    kept = []
    for keys, query in real_states():
        exact = torch.einsum("hgd,hnd->hgn", query.view(keys.shape[0], -1, keys.shape[2]), keys).flatten(0, 1)
        codes, folded = coded(keys, query, bits)
        scores = torch.einsum("hgd,hnd->hgn", folded.double(), codes.double()).flatten(0, 1)
        k = int(share * keys.shape[1])
        for want, have in zip(exact, scores, strict=True):
            kept.append(len(set(want.topk(k).indices.tolist()) & set(have.topk(k).indices.tolist())) / k)
    return sum(kept) / len(kept)
