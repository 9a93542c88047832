"""Time saved by sessions: seconds to open one against seconds of prefill: python -m benchmarks.reopen"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from hillinfer.assets import load_embedded
from hillinfer.longbench.comparison import demo_records
from hillinfer.longbench.runner import feed, synthetic_prompt
from hillinfer.session import open_session, save_session
from hillinfer.systems.registry import list_systems, make_cache

TOKENS, ROUNDS = 8000, 5


def measure(systems: tuple[str, ...], tokens: int = TOKENS, rounds: int = ROUNDS) -> dict[str, dict]:
    """Figures by system: tokens `n`, file `bytes`, and seconds of `prefill` (median of 3) and of opening.

    `warm` opens a file in the page cache, `cold` one that is not (medians of `rounds`).
    """
    torch.set_num_threads(os.cpu_count() or 1)
    model, tokenizer = load_embedded()
    ids = synthetic_prompt(tokenizer, demo_records({"lines_8k": 1})[0])[1].ids[:tokens]
    out = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for system in systems:
            path = Path(folder) / "doc.kv"
            options = dict(alpha=0.2) | (dict(drive=folder) if list_systems()[system].needs_drive else {})
            prefill, opened = [], {"warm": [], "cold": []}
            for number in range(3):
                with make_cache(model, system, **options) as cache:
                    start = time.perf_counter()
                    feed(model, cache, ids)
                    prefill.append(time.perf_counter() - start)
                    if number == 2:
                        save_session(cache, path, model, ids)
            for _ in range(rounds):
                for state, seconds in opened.items():
                    if state == "cold":
                        with path.open("rb") as file:
                            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    start = time.perf_counter()
                    cache, _ = open_session(path, model, system, **options)
                    seconds.append(time.perf_counter() - start)
                    cache.close()
            figures = {name: statistics.median(seconds) for name, seconds in opened.items()}
            out[system] = figures | dict(prefill=statistics.median(prefill), n=len(ids), bytes=path.stat().st_size)
    return out


def main() -> int:
    for system, row in measure(("full", "topk", "hillinfer")).items():
        print(
            f"{system}: {row['n']:,} tokens, {row['bytes'] / 2**20:.0f} MiB; prefill {row['prefill']:.2f} s, opened in "
            f"{row['warm']:.3f} s ({row['prefill'] / row['warm']:.0f} x faster), from the disk {row['cold']:.3f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
