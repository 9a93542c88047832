"""Prefill with KV on the drive, against transformers' DynamicCache: python -m benchmarks.prefill MODEL [--tokens N,N]

Ways alternate, each in one pass and in chunks, over the same text. Seconds are of wall clock and of processors, for a
machine that others use as well. `--peak` runs each way once more, in a process of its own, for the memory that it
needs beyond the weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache

from hillinfer.assets import machine
from hillinfer.loading import load_model
from hillinfer.longbench.runner import feed
from hillinfer.longbench.synthetic import make_records, prompt_of
from hillinfer.systems.registry import make_cache

CHUNK = 512
WAYS = {  # name -> system or None for DynamicCache, and the chunk
    "DynamicCache, one pass": (None, None),
    "hillinfer, one pass": ("hillinfer", None),
    "DynamicCache, chunks": (None, CHUNK),
    "hillinfer, chunks": ("hillinfer", CHUNK),
}
FIRST = "DynamicCache, one pass"


def text_ids(tokenizer, n: int) -> list[int]:
    """Token ids of synthetic documents, end to end."""
    text, seed = "", 0
    while len(ids := tokenizer(text).input_ids) < n:
        text, seed = text + prompt_of(make_records("chain", 4096, 1, seed)[0]), seed + 1
    return ids[:n]


def once(model, ids: list[int], way: str, drive: Path) -> tuple[float, float]:
    """Seconds of wall clock and of processors for one prefill."""
    system, chunk = WAYS[way]
    with tempfile.TemporaryDirectory(dir=drive) as folder:
        options = dict(drive=folder, alpha=0.1)
        cache = make_cache(model, system, **options) if system else DynamicCache(config=model.config)
        start, busy = time.perf_counter(), time.process_time()
        feed(model, cache, ids, chunk)
        took = time.perf_counter() - start, time.process_time() - busy
        if system:
            cache.close()
    return took


def resident() -> int:
    """Anonymous memory of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Most anonymous memory of this process while the context is open, sampled every 5 ms: a list of one number."""
    most, done = [resident()], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def peak(model, ids: list[int], way: str, drive: Path) -> int:
    """Most anonymous bytes beyond those before the prefill."""
    feed(model, DynamicCache(config=model.config), ids[:64])  # the libraries' own buffers
    before = resident()
    with sampled() as most:
        once(model, ids, way, drive)
    return most[0] - before


def measure(name: str, tokens: list[int], ways: list[str], drive: Path, turns: int, dtype: str) -> list[dict]:
    """One row per length and way."""
    model, tokenizer = load_model(name, dtype=dtype)
    rows = []
    for n in tokens:
        ids, took = text_ids(tokenizer, n), {way: [] for way in ways}
        for _ in range(turns):
            for way in ways:
                took[way].append(once(model, ids, way, drive))
        for way in ways:
            wall, busy = (statistics.median(column) for column in zip(*took[way], strict=True))
            ratios = [own[0] / first[0] for own, first in zip(took[way], took[ways[0]], strict=True)]
            low, mid, high = np.quantile(ratios, [0, 0.5, 1])
            rows.append(dict(tokens=n, way=way, seconds=wall, cpu=busy, ratio=mid, low=low, high=high))
            print(f"{n:7,} tokens | {way:24} | {wall:7.2f} s, {busy:7.2f} CPU s | {mid:.2f} ({low:.2f} to {high:.2f})")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--tokens", default="8192")
    parser.add_argument(
        "--ways", default=",".join(map(str, range(len(WAYS)))), help="numbers of WAYS; ratios are to the first"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to use")
    parser.add_argument("--peak", action="store_true", help="memory instead of time")
    parser.add_argument("--out", type=Path, default=Path("out/prefill.json"))
    words = parser.parse_args()
    words.drive.mkdir(parents=True, exist_ok=True)
    ways, tokens = (
        [list(WAYS)[int(number)] for number in words.ways.split(",")],
        [int(n) for n in words.tokens.split(",")],
    )
    if words.peak:
        if len(ways) * len(tokens) > 1:
            for n in tokens:
                for way in ways:
                    number = list(WAYS).index(way)
                    own = [words.model, "--tokens", str(n), "--ways", str(number), "--dtype", words.dtype, "--peak"]
                    subprocess.run(
                        [sys.executable, "-m", "benchmarks.prefill", *own, "--drive", words.drive], check=True
                    )
            return
        model, tokenizer = load_model(words.model, dtype=words.dtype)
        size = peak(model, text_ids(tokenizer, tokens[0]), ways[0], words.drive)
        print(f"{tokens[0]:7,} tokens | {ways[0]:24} | peak {size / 2**20:7.0f} MiB beyond the weights", flush=True)
        return
    rows = measure(words.model, tokens, ways, words.drive, words.turns, words.dtype)
    words.out.write_text(
        json.dumps({"machine": machine(), "model": words.model, "rows": rows}, indent=1), encoding="utf-8"
    )
    print(pd.DataFrame(rows).round(2).to_string(index=False), f"\n{torch.get_num_threads()} threads; {machine()}")


if __name__ == "__main__":
    main()
