"""The experiments of docs/experiments.md on a real model's attention:

    python -m benchmarks.real_attention MODEL --rows FOLDER --tasks gov_report,hotpotqa --tokens 8000

MODEL continues LongBench rows greedily with hillinfer's selection; what each layer selects, and what is guessed one
layer ahead, is recorded. The pool's rules are then replayed on the recording with the product's own store and small
records; selections per head, codes and chunk sizes are measured in decodes of their own. No times are measured.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from transformers import Qwen3Config

from benchmarks import chunks
from benchmarks.placement import CONTROLS
from benchmarks.selection import Study
from benchmarks.trace import selections
from hillinfer.assets import machine
from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.evaluator.policy import Policy
from hillinfer.loading import load_model
from hillinfer.longbench.job import prompt_of
from hillinfer.longbench.prefilled import Prefilled
from hillinfer.longbench.runner import feed
from hillinfer.longbench.sources import load_all
from hillinfer.models.seam import attention
from hillinfer.tiers.hits import PLACEMENTS, LayerHits

ALPHA, STEPS, CHUNK = 0.1, 48, 2048
DIM = 16  # of the replayed records, whose content does not matter


class Replayed(Policy):
    """Selects what was recorded."""

    needs_codes = False
    picks: list[list[np.ndarray]] = []  # by layer, step

    def start(self, *shape):
        self.steps = 0

    def select(self, step):
        self.steps += 1
        return self.picks[step.layer][self.steps - 1]


def replay(picks: list[list[np.ndarray]], n: int, **options) -> dict:
    """The pool's misses and swaps, both per step and layer as shares of the attended tokens, under these `Settings`."""
    Replayed.picks = picks
    config = Qwen3Config(
        hidden_size=DIM, num_hidden_layers=len(picks), num_attention_heads=1, num_key_value_heads=1, head_dim=DIM
    )
    kv, module = torch.zeros(1, 1, n, DIM), torch.nn.Identity()
    with tempfile.TemporaryDirectory() as drive, torch.inference_mode():
        settings = Settings(alpha=ALPHA, drive=drive, lookahead=False, **options)
        with TieredCache(config, Replayed, settings) as cache:
            for layer in range(len(picks)):
                cache.update(kv[:, :, : n - 1], kv[:, :, : n - 1], layer)
            for _ in picks[0]:
                for layer in range(len(picks)):
                    keys, values = cache.update(kv[:, :, :1], kv[:, :, :1], layer)
                    attention(None, module, kv[:, :, :1], keys, values, scaling=1.0)
            frame = cache.counters.frame()
    return {"misses": frame.drive.sum() / frame.attended.sum(), "swaps per layer and step": frame.swapped.mean()}


def pool(picks: list, n: int) -> pd.DataFrame:
    """Ranking, pins, decay and size of the pool on one recording."""
    rows = []
    for placement in (*PLACEMENTS, *CONTROLS):
        instead = CONTROLS.get(placement, {})
        with mock.patch.dict(PLACEMENTS, instead):
            found = replay(picks, n, placement=next(iter(instead), placement))
        rows.append({"experiment": "ranking", "way": placement} | found)
    for pinned in (ALPHA, ALPHA / 2, ALPHA / 4, 0.0):
        rows.append({"experiment": "pinned", "way": f"{pinned:g}"} | replay(picks, n, pinned=pinned))
    for shift in (1, 2, 3, 4, 5):

        def age(self, shift=shift) -> None:
            self.rank -= self.rank >> shift

        with mock.patch.object(LayerHits, "age", age):
            rows.append({"experiment": "counters lose", "way": f"1/{2**shift}"} | replay(picks, n))
    token_bytes = len(picks) * 2 * DIM * 4
    for share in (0.1, 0.15, 0.2, 0.3, 0.4):
        found = replay(picks, n, host_budget=int((share + 0.001) * n * token_bytes), pinned=0.0)
        rows.append({"experiment": "pool holds", "way": f"{share:g}"} | found)
    return pd.DataFrame(rows)


def guesses(noted: list) -> pd.DataFrame:
    """Accuracy of a guess one layer ahead, and the share of what was needed that it covers."""
    rows = []
    for kind in ("guess", "sure"):
        pairs = [pair for layer in noted[1:] for pair in zip(layer.kept[kind], layer.kept["true"], strict=True)]
        hits = sum(len(np.intersect1d(*pair, assume_unique=True)) for pair in pairs)
        guessed, needed = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
        row = {"experiment": "guess", "way": "whole" if kind == "guess" else "surest 0.6"}
        rows.append(row | {"accuracy": hits / guessed, "coverage": hits / needed})
    return pd.DataFrame(rows)


def heads(model, source: Prefilled, ids: list[int]) -> pd.DataFrame:
    """Mass kept and records read by selections per KV head and per layer, and recall of coded keys."""
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.masking_utils import sdpa_mask

    rows, before = [], model.config._attn_implementation
    for bits, per_head in product((8, 4), (True, False)):
        study, cache = Study(bits, per_head, ALPHA), DynamicCache(config=model.config)
        AttentionInterface.register("study", study.attend)
        AttentionMaskInterface.register("study", sdpa_mask)
        model.set_attn_implementation("study")
        for index, layer in enumerate(source.layers):
            cache.update(layer.keys.clone(), layer.values.clone(), index)
        for token in ids:
            feed(model, cache, [token])
        notes = pd.DataFrame({"what": what, "mean": np.mean(values)} for (_, what), values in study.notes.items())
        way = f"INT{bits} {'per head' if per_head else 'per layer'}"
        rows.append({"experiment": "selection", "way": way} | notes.groupby("what")["mean"].mean().to_dict())
    model.set_attn_implementation(before)
    return pd.DataFrame(rows)


def chunk_sizes(model, source: Prefilled, ids: list[int]) -> pd.DataFrame:
    """Chunks of each size and slack that miss a head's heaviest token at alpha 0.2; reads of LeoAM's tree, by layer."""
    rows = []
    for policy, settings in ((chunks.Misses, Settings(alpha=0.2)), (chunks.Study, Settings(alpha=0.2))):
        policy.found = []
        with TieredCache(model.config, policy, settings) as cache:
            source.fill(cache, model.device)
            for token in ids:
                feed(model, cache, [token])
    sums = pd.DataFrame(chunks.Misses.found).groupby(["size", "slack"])[["heads", "missed"]].sum()
    for (size, slack), row in sums.iterrows():
        rows.append({"experiment": "chunks miss", "way": f"{size}, {slack:g}", "missed": row.missed / row.heads})
    read = pd.DataFrame(chunks.Study.found).groupby("method", sort=False)[["evaluated", "read", "important"]].mean()
    rows += [{"experiment": "chunks read", "way": method} | row.to_dict() for method, row in read.iterrows()]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--rows", type=Path, required=True, help="folder of LongBench rows")
    parser.add_argument("--tasks", default="gov_report,hotpotqa")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("out/real_attention.csv"))
    words = parser.parse_args()
    model, tokenizer = load_model(words.model)
    frames = []
    for task, records, _ in load_all(words.tasks.split(","), [words.rows], "main"):
        longest = max(records, key=lambda record: len(record["context"]))
        ids = prompt_of(task, longest, model.config, tokenizer, words.tokens).ids
        with torch.inference_mode():
            noted, answer = selections(model, ids, STEPS, ALPHA, CHUNK)
            source = Prefilled(model.config)
            feed(model, source, ids[:-1], CHUNK)
            picks = [layer.kept["true"] for layer in noted]
            parts = (
                pool(picks, len(ids)),
                guesses(noted),
                *(study(model, source, [ids[-1], *answer]) for study in (heads, chunk_sizes)),
            )
        frames += [part.assign(task=task.name, tokens=len(ids)) for part in parts]
        words.out.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(frames).to_csv(words.out, index=False)
        print(pd.concat(frames[-4:]).to_string(index=False, float_format="%.3f", na_rep=""), flush=True)
    print(f"{words.model} in {model.dtype}, alpha {ALPHA}, {STEPS} greedy steps; {machine()}; {words.out}")


if __name__ == "__main__":
    main()
