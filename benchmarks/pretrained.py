"""Pretrained models answer as with transformers' own cache: python -m benchmarks.pretrained MODEL ...

At the full budget `full`, and `hillinfer` from the drive and looking ahead, must give the same greedy tokens; at alpha
0.2 every system must run, and the table says for how many tokens it agrees. The prompt is this project's README.
"""

import argparse
import tempfile
import time
from itertools import takewhile
from pathlib import Path

import torch
from transformers import DynamicCache

from benchmarks.claims import Claim, verdict
from hillinfer import list_systems, load_model, make_cache
from hillinfer.errors import UsageError

TOKENS, NEW = 1500, 40
EXACT = {"full": {}, "hillinfer": dict(host_budget="4MiB", lookahead=True)}


def answer(model, ids: torch.Tensor, cache) -> list[int]:
    """NEW greedy tokens."""
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return model.generate(ids, past_key_values=cache, **how)[0, ids.shape[1] :].tolist()


def agreement(model, ids: torch.Tensor, want: list[int], system: str, options: dict) -> tuple[int, str]:
    """Tokens until the first that differs, and what the run was."""
    with tempfile.TemporaryDirectory() as folder:
        drive = {"drive": folder} if list_systems()[system].needs_drive or system == "leoam" else {}
        with make_cache(model, system, **drive, **options) as cache:
            start = time.perf_counter()
            got = answer(model, ids, cache)
            took, rates = time.perf_counter() - start, cache.counters.rates()
            about = f"{took:.1f} s in all, {rates['drive']:.0%} from the drive; {cache.support}"
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(want, got, strict=True)))), about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="folders, hub ids or .gguf files")
    words, claims = parser.parse_args(), []
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8") * 3
    for name in words.models:
        model, tokenizer = load_model(name, "float32")
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        want = answer(model, ids, DynamicCache(config=model.config))
        for system, options in EXACT.items():
            same, about = agreement(model, ids, want, system, options | {"alpha": 1.0})
            claims.append(
                Claim(f"{name}: {system} at alpha 1", f"{same} tokens; {about}", f"{NEW}", same == NEW).show()
            )
        for system in list_systems():
            try:
                same, about = agreement(model, ids, want, system, {"alpha": 0.2})
                claims.append(Claim(f"{name}: {system} at 0.2", f"{same} tokens; {about}", "runs", True).show())
            except UsageError as error:
                claims.append(Claim(f"{name}: {system} at 0.2", str(error), "runs", False).show())
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
