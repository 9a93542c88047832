"""Decode speed of the embedded model over 8K to 32K tokens, all systems: python -m benchmarks.real [--out FILE]

Real text, real attention, and a real drive read with O_DIRECT. Contexts beyond the model's window measure speed only;
its answers there are meaningless. One prefill serves all contexts and systems, which then alternate on the same tokens.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.utils import logging

from benchmarks.micro import facts, keep
from hillinfer.assets import load_embedded
from hillinfer.longbench.prefilled import Prefilled
from hillinfer.longbench.synthetic import make_records, prompt_of
from hillinfer.systems.registry import make_cache

CONTEXTS = (8192, 16_384, 32_768)
ALPHA, WARM, STEPS = 0.1, 14, 20  # the warm-up includes five trial steps of each lookahead mode
WAYS = {  # name -> system and options; "drive" is filled in
    "DynamicCache": None,
    "full": ("full", {}),
    "topk": ("topk", {}),
    "topk int4": ("topk", {"precision": "int4"}),
    "hillinfer": ("hillinfer", {"drive": True}),
    "flexgen": ("flexgen", {"drive": True, "host_budget": 0}),
    "leoam": ("leoam", {"drive": True}),
    "dualblade": ("dualblade", {"drive": True, "host_budget": 0}),
}


def prefill(n: int) -> tuple[DynamicCache, int]:
    """A DynamicCache of n tokens of text, and the token that the model predicts next."""
    model, tokenizer = load_embedded()
    ids = tokenizer(prompt_of(make_records("chain", n + 512, 1, 5)[0])).input_ids[:n]
    cache = DynamicCache(config=model.config)
    for part in torch.tensor([ids]).split(1024, 1):
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, int(logits[0, -1].argmax())


def cut(source: DynamicCache, n: int, cache: DynamicCache) -> DynamicCache:
    """The source's first n tokens in an empty cache, equal to a prefill of these tokens alone."""
    for index, layer in enumerate(source.layers):
        cache.update(layer.keys[:, :, :n].clone(), layer.values[:, :, :n].clone(), index)
    return cache


def measure(contexts: tuple[int, ...], folder: Path, ways: dict = WAYS, steps: int = STEPS) -> dict:
    """One row per context and system, and the seconds of each measured step by (system, context)."""
    source, token = prefill(max(contexts))
    rows, seconds = [], {}
    for n in contexts:
        models, caches = {}, {}
        for name, way in ways.items():
            models[name] = load_embedded()[0]  # a separate model each: lookahead installs hooks
            kind = DynamicCache if way is None else Prefilled
            caches[name] = cut(source, n, kind(config=models[name].config))
            if way is not None:
                system, options = way[0], {"alpha": ALPHA} | way[1]
                cache = make_cache(models[name], system, **options | ({"drive": folder} if "drive" in options else {}))
                caches[name].fill(cache, torch.device("cpu"))
                caches[name] = cache
        wall, cpu = {name: [] for name in ways}, {name: [] for name in ways}
        try:
            for step in range(WARM + steps):
                for name in ways if step % 2 else reversed(ways):
                    before, start = time.process_time(), time.perf_counter()
                    logits = models[name](torch.tensor([[token]]), past_key_values=caches[name], use_cache=True).logits
                    wall[name].append(time.perf_counter() - start)
                    cpu[name].append(time.process_time() - before)
                    if name == next(iter(ways)):
                        following = int(logits[0, -1].argmax())
                token = following  # the same for all systems
            for name, cache in caches.items():
                low, middle, high = (1e3 * q for q in statistics.quantiles(wall[name][WARM:], n=4))
                row = {"system": name, "tokens": n, "ms": middle, "ms_low": low, "ms_high": high}
                rows.append(row | {"cpu_ms": 1e3 * statistics.median(cpu[name][WARM:])} | traffic(cache, steps))
                seconds[name, n] = wall[name][WARM:]
        finally:
            for cache in caches.values():
                if not isinstance(cache, DynamicCache):
                    cache.close()
    return {"rows": rows, "seconds": seconds}


def traffic(cache, steps: int) -> dict:
    """Drive bytes per token and pool hits over the last steps."""
    if isinstance(cache, DynamicCache):
        return {"drive_mb": 0.0, "pool_hits": 0.0}
    rows = cache.counters.rows[-steps * len(cache.layers) :]
    spans = [span for span in cache.timeline.spans if span.lane == "drive" and span.step > cache.timeline.step - steps]
    far = sum(row.host + row.drive for row in rows)
    moved = sum(span.bytes for span in spans if span.kind != "write")
    return {"drive_mb": moved / steps / 1e6, "pool_hits": sum(row.host for row in rows) / far if far else 0.0}


def ratio(result: dict, n: int, slow: str, fast: str) -> tuple[float, float, float]:
    """Speed-up of `fast` over `slow` at n tokens: lower quartile, median and upper quartile over the turns."""
    pairs = zip(result["seconds"][slow, n], result["seconds"][fast, n], strict=True)
    return tuple(statistics.quantiles([one / other for one, other in pairs], n=4))


def show(result: dict) -> None:
    print(f"{'':16}{'tokens':>8}{'ms':>9}{'quartiles':>18}{'CPU ms':>9}{'drive MB':>10}{'pool hits':>10}")
    for row in result["rows"]:
        spread = f"{row['ms_low']:.1f}-{row['ms_high']:.1f}"
        print(f"{row['system']:16}{row['tokens']:8}{row['ms']:9.2f}{spread:>18}{row['cpu_ms']:9.1f}", end="")
        print(f"{row['drive_mb']:10.1f}{row['pool_hits']:10.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(CONTEXTS))
    parser.add_argument("--systems", default=",".join(WAYS))
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to benchmark")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the result here as JSON, for benchmarks.compare")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    logging.disable_progress_bar()
    words.drive.mkdir(parents=True, exist_ok=True)
    ways = {name: WAYS[name] for name in words.systems.split(",")}
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=words.drive) as folder:
        result = measure(tuple(words.tokens), Path(folder), ways)
    show(result)
    keep(words.out, {"facts": facts(STEPS), "rows": result["rows"]})


if __name__ == "__main__":
    main()
