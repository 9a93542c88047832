"""Full-budget decode against transformers' DynamicCache: python -m benchmarks.overhead [--threads N] [--out FILE]

The embedded model with random KV of each length (beyond its context window for speed only), one token at a time through
the model's forward pass, both caches alternating. Both keep all KV in memory and attend to all of it.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.utils import logging

from benchmarks.claims import Claim, verdict
from benchmarks.micro import facts, keep
from hillinfer.assets import load_embedded
from hillinfer.systems.registry import make_cache

CONTEXTS = (128, 512, 2048, 8192, 32_768)
STEPS, WARM = 60, 5


def measure(contexts: tuple[int, ...] = CONTEXTS, steps: int = STEPS) -> list[dict]:
    """One row per context: ms of both, and the median over steps of DynamicCache's time over ours."""
    (plain, _), (tiered, _) = load_embedded(), load_embedded()
    config, rows, token = plain.config, [], torch.tensor([[5]])
    for n in contexts:
        caches = {"dynamic": DynamicCache(config=config), "full": make_cache(tiered, "full")}
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(2, 1, config.num_key_value_heads, n, config.head_dim, dtype=plain.dtype)
            for cache in caches.values():
                cache.update(keys, values, layer)
        wall, cpu = {name: [] for name in caches}, {name: [] for name in caches}
        ways = [("dynamic", plain), ("full", tiered)]
        for step in range(steps + WARM):
            for name, model in ways if step % 2 else ways[::-1]:
                start, before = time.perf_counter(), time.process_time()
                model(token, past_key_values=caches[name], use_cache=True)
                wall[name].append(1e3 * (time.perf_counter() - start))
                cpu[name].append(1e3 * (time.process_time() - before))
        row = {"tokens": n}
        for unit, times in (("ms", wall), ("cpu_ms", cpu)):
            ratios = [one / ours for one, ours in zip(times["dynamic"], times["full"], strict=True)][WARM:]
            low, _, high = statistics.quantiles(ratios, n=4)
            row |= {f"dynamic_{unit}": statistics.median(times["dynamic"][WARM:])}
            row |= {f"full_{unit}": statistics.median(times["full"][WARM:])}
            row |= {f"ratio_{unit}": statistics.median(ratios), f"low_{unit}": low, f"high_{unit}": high}
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the result here as JSON, for benchmarks.compare")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    logging.disable_progress_bar()
    with torch.inference_mode():
        rows, claims = measure(), []
    about = facts(STEPS)
    print(f"{about['machine']}, load {about['load']:.1f}, kernels for {about['isa']}; medians and quartiles")
    for row in rows:
        text = f"{row['tokens']:6} tokens: DynamicCache {row['dynamic_ms']:.2f} ms, full {row['full_ms']:.2f} ms"
        figure = f"{row['ratio_ms']:.2f}x ({row['low_ms']:.2f} to {row['high_ms']:.2f}; CPU {row['ratio_cpu_ms']:.2f}x)"
        bar = 1 / 1.05 if row["tokens"] == 128 else 1.0
        claims.append(Claim(text, figure, f"{bar:.2f}x or better", row["ratio_ms"] >= bar).show())
    keep(words.out, {"facts": about, "rows": rows})
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
