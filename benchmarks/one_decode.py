"""Many ways in one decode against one by one, in turns:

    python -m benchmarks.one_decode MODEL --rows FOLDER --task gov_report --tokens 6000

The ways are systems x alphas over one shared prefill, in memory; both sides answer the same question from caches filled
alike. Only decoding is timed: the question token by token, and the answer. A way whose answer differs met a near-tie
that a batched product rounds to the other side; such ways are counted.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from hillinfer.assets import machine
from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.loading import load_model
from hillinfer.longbench.job import prompt_of
from hillinfer.longbench.runner import answer, prefill
from hillinfer.longbench.sources import load_all
from hillinfer.systems.registry import POLICIES

SYSTEMS = ("topk", "quest", "h2o", "snapkv", "infinigen", "streaming", "oracle", "random")
ALPHAS = (0.2, 0.1, 0.05)


def decode(model, tokenizer, task, prompt, source, ways: list) -> tuple[float, list[str]]:
    """Seconds and answers of these ways, (policy, settings) each, in one decode."""
    with ExitStack() as stack:
        caches = [stack.enter_context(TieredCache(model.config, *way)) for way in ways]
        for cache in caches:
            source.fill(cache, model.device)
        start = time.perf_counter()
        answers = answer(model, tokenizer, task, prompt, caches, [0.0] * len(ways))
        return time.perf_counter() - start, [each.text for each in answers]


def measure(model, tokenizer, rows: Path, name: str, tokens: int, turns: int, new_tokens: int) -> dict:
    """Seconds of each turn, together and one by one; and how many answers differ."""
    ((task, records, _),) = load_all([name], [rows], "main")
    task = replace(task, max_new_tokens=new_tokens)
    longest = max(records, key=lambda record: len(record["context"]))
    prompt = prompt_of(task, longest, model.config, tokenizer, tokens)
    ways = [(POLICIES[system], Settings(alpha=alpha)) for system in SYSTEMS for alpha in ALPHAS]
    found = {"tokens": len(prompt.ids), "ways": len(ways), "together": [], "one by one": [], "differ": 0}
    with torch.inference_mode():
        source = prefill(model, prompt, policies={policy for policy, _ in ways if policy.watches})
        for _ in range(turns):
            seconds, together = decode(model, tokenizer, task, prompt, source, ways)
            found["together"].append(seconds)
            alone = [decode(model, tokenizer, task, prompt, source, [way]) for way in ways]
            found["one by one"].append(sum(seconds for seconds, _ in alone))
            found["differ"] = sum(text != own for text, (_, (own,)) in zip(together, alone, strict=True))
            print(f"together {found['together'][-1]:.1f} s, one by one {found['one by one'][-1]:.1f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--rows", type=Path, required=True, help="folder of LongBench rows")
    parser.add_argument("--task", default="gov_report")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    words = parser.parse_args()
    model, tokenizer = load_model(words.model)
    found = measure(model, tokenizer, words.rows, words.task, words.tokens, words.turns, words.new_tokens)
    ratios = [alone / together for together, alone in zip(found["together"], found["one by one"], strict=True)]
    print(
        f"{found['ways']} ways, {found['tokens']:,} tokens: one by one over together, median of {len(ratios)} turns "
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}); {found['differ']} answers differ"
    )
    print(f"{words.model} in {model.dtype}; {machine()}")


if __name__ == "__main__":
    main()
