"""Selection study: recall of coded keys by layer, and selection per KV head against selection per layer.

    python -m benchmarks.selection --n 8

This bypasses the package's own path: all KV is in memory, and decode steps attend under a mask. `per head` selects the
best alpha*N tokens of each KV head; `per layer` selects the same alpha*N for all heads (`head_ranks`, as in the
package). A record holds the K and V of all heads, so the tokens read are the union over heads.
"""

import argparse
from collections import defaultdict

import numpy as np
import pandas as pd
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from hillinfer.assets import load_embedded
from hillinfer.config import Settings
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.evaluator.ranks import head_ranks
from hillinfer.evaluator.topk import topk
from hillinfer.longbench.comparison import demo_records
from hillinfer.longbench.runner import feed, is_right, split_prompt
from hillinfer.longbench.synthetic import MAX_NEW_TOKENS

TASKS = ("lines_2k", "chain_2k", "majority_2k")


class Study:
    """An attention function that selects by coded keys and records statistics."""

    def __init__(self, bits: int, per_head: bool, alpha: float):
        self.bits, self.per_head, self.settings = bits, per_head, Settings(alpha=alpha)
        self.codes: dict[int, KeyCodes] = {}
        self.notes = defaultdict(list)  # (layer, what) -> values

    def attend(self, module, query, keys, values, mask, scaling=None, **kwargs):
        """query (1, H, q, D), keys and values (1, Hkv, N, D) -> (1, q, H, D). Steps with several queries are exact."""
        _, kv_heads, n, dim = keys.shape
        layer = module.layer_idx
        codes = self.codes.setdefault(layer, KeyCodes(1, kv_heads, dim, self.bits))
        codes.append(keys[:, :, codes.codes.n :])
        if query.shape[2] > 1:
            return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling, **kwargs)
        logits = torch.einsum("hgd,hnd->hgn", query[0, :, 0].view(kv_heads, -1, dim).float(), keys[0].float()) * scaling
        chosen, best, k = self.choose(codes, query[0, :, 0], n, scaling)
        true = (logits - logits.logsumexp(2, keepdim=True)).amax(1).topk(k, 1).indices
        recall = torch.gather(best, 1, true).float().mean()
        weights = logits.softmax(2)
        self.notes[layer, "recall"].append(recall.item())
        self.notes[layer, "mass kept"].append((weights * chosen[:, None]).sum(2).mean().item())
        self.notes[layer, "tokens read"].append(chosen.any(0).float().mean().item())
        weights = logits.masked_fill(~chosen[:, None], -torch.inf).softmax(2)
        out = torch.einsum("hgn,hnd->hgd", weights, values[0].float()).to(query.dtype)
        return out.reshape(1, 1, -1, dim), None

    def choose(
        self, codes: KeyCodes, query: torch.Tensor, n: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Selected keys (Hkv, n) bool, each head's best keys by codes (Hkv, n) bool, and their number per head."""
        settings, (coded, unit) = self.settings, codes.query(query, 0)
        every = codes.scorer(coded, 0)(None)
        steps = np.repeat(unit * np.float32(scaling), coded.shape[1])
        groups = np.split(every, len(coded)), np.split(steps, len(coded))
        scores = np.stack([head_ranks(*group) for group in zip(*groups, strict=True)])  # (Hkv, n)
        budget = settings.budget(n)
        near = np.zeros(n, bool)
        near[: settings.sinks] = near[-settings.recent :] = True
        k = budget - int(near.sum())
        best = torch.zeros(scores.shape, dtype=torch.bool)
        for head, row in enumerate(scores):
            best[head, torch.from_numpy(topk(row, budget).copy())] = True
        far = np.flatnonzero(~near)
        chosen = torch.from_numpy(near).repeat(len(scores), 1)
        if self.per_head:
            for head, row in enumerate(scores):
                chosen[head, torch.from_numpy(far[topk(row[far], k)])] = True
        else:
            ranks = head_ranks(every, steps)
            chosen[:, torch.from_numpy(far[topk(ranks[far], k)])] = True
        return chosen, best, budget


def answer(model, tokenizer, record: dict) -> str:
    context, question = split_prompt(tokenizer, record)
    cache = DynamicCache(config=model.config)
    for part in (context, *([token] for token in question[:-1])):
        feed(model, cache, part)
    ids = torch.tensor([context + question])
    out = model.generate(ids, past_key_values=cache, max_new_tokens=MAX_NEW_TOKENS[record["dataset"]], do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def measure(tasks: list[str], n: int, alphas: list[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two frames: accuracy, attention mass and reads by variant; recall by layer."""
    model, tokenizer = load_embedded()
    rows, layers = [], []
    for alpha in alphas:
        for bits in (8, 4):
            for per_head in (True, False):
                for task in tasks:
                    study, right = Study(bits, per_head, alpha), 0
                    AttentionInterface.register("study", study.attend)
                    AttentionMaskInterface.register("study", sdpa_mask)
                    model.set_attn_implementation("study")
                    for record in demo_records({task: n}):
                        study.codes.clear()
                        right += is_right(record, answer(model, tokenizer, record))
                    frame = pd.DataFrame(
                        {"layer": layer, "what": what, "value": np.mean(values)}
                        for (layer, what), values in study.notes.items()
                    )
                    way = {"task": task, "alpha": alpha, "codes": f"int{bits}"}
                    means = frame.groupby("what").value.mean()
                    one = {"selection": "per head" if per_head else "per layer", "right": right, "of": n}
                    rows.append(way | one | means.to_dict())
                    print(rows[-1], flush=True)
                    if per_head:
                        layers += [way | row for row in frame[frame.what == "recall"].to_dict("records")]
    return pd.DataFrame(rows), pd.DataFrame(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1])
    parser.add_argument("--n", type=int, default=8, help="questions per task")
    args = parser.parse_args()
    logging.disable_progress_bar()
    rows, layers = measure(args.tasks, args.n, args.alphas)
    print(rows.drop(columns="recall").to_string(index=False, float_format="%.3f"))
    print("\nrecall of each KV head's true alpha*N by its codes' alpha*N, by layer")
    print(layers.pivot_table("value", ["alpha", "codes"], "layer").to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()
