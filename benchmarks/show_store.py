"""Every claim about the prefix store, measured again: make show-store MODELS=FOLDER

MODELS holds a folder for each real model (config.json, tokenizer and weights). Times are those of the embedded model.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import DynamicCache

from benchmarks import store_processes
from benchmarks.claims import Claim, tests, verdict
from hillinfer.assets import load_embedded, machine
from hillinfer.loading import load_model
from hillinfer.longbench.comparison import demo_records
from hillinfer.longbench.runner import decode, feed, synthetic_prompt
from hillinfer.prefix_store.blocks import BLOCK, PrefixStore
from hillinfer.systems.registry import list_systems, make_cache

LATE = [name for name, found in list_systems().items() if found.policy.late]
KILLS = int(os.environ.get("KILLS", 300))
ROUNDS = 3


@contextmanager
def folders() -> Iterator[tuple[Path, PrefixStore]]:
    """A folder for the drive, and a new store without a limit."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name), PrefixStore(Path(name) / "store", None)


def options_of(system: str, drive: Path) -> dict:
    return dict(alpha=0.2) | (dict(drive=drive) if list_systems()[system].needs_drive else {})


def document(tokenizer, tokens: int) -> list[int]:
    """The first tokens of key-value lines, and as many more as it takes."""
    ids = synthetic_prompt(tokenizer, demo_records({"lines_8k": 1})[0])[1].ids
    return (ids * (1 + tokens // len(ids)))[:tokens]


def processes() -> list[Claim]:
    """First, as it forks: that must happen before there are threads."""
    killed = store_processes.kill(KILLS)
    broken = {name: killed[name] for name in ("wrong", "damaged", "orphans left", "above the quota")}
    text = f"after {KILLS} SIGKILLs while writing, reading and evicting ({killed['orphans']} in a draft)"
    figure = f"{killed['right']} right answers; " + ", ".join(f"{n} {name}" for name, n in broken.items())
    claims = [Claim(text, figure, "none wrong, damaged, left or above", not any(broken.values())).show()]
    agreed = store_processes.read(10)
    claims.append(Claim("readers at once that answer rightly", f"{agreed} of 10", "all", agreed == 10).show())
    single, rounds = store_processes.write()
    text = "two processes write the same prompt at once: one copy, both right"
    claims.append(Claim(text, f"{single} of {rounds} rounds", "all", single == rounds).show())
    most = store_processes.fill()
    text = "largest size while two processes fill and evict, over the quota"
    return [*claims, Claim(text, f"{most:.4f}", "1.01", most <= 1.01).show()]


def suite() -> list[Claim]:
    names = {
        "every system and three families: to the bit a prefill of the same pieces": "TestEqualsAPrefill",
        "blocks that a cache reads where they lie: shared, evicted, damaged, cropped": "TestLending",
        "what is kept, and what is not": "TestKept",
        "batches, padding, all logits, other inputs: an ordinary prefill, with the reason": "TestNotUsed",
        "truncated, flipped bit, other model or dtype, disk full, read-only: a line, and right": "TestLostAndDamaged",
        "quota smaller than a block, eviction of leaves, clock set back": "TestQuota",
    }
    return [tests(text, f"tests/test_prefix_store.py::{name}").show() for text, name in names.items()]


def real(models: Path, tokens: int = 2 * BLOCK + 40) -> list[Claim]:
    """Greedy answers of every system from the store, against a fresh prefill of the same two pieces."""
    claims, cut = [], tokens // BLOCK * BLOCK
    for path in sorted(path.parent for path in models.glob("*/config.json")):
        model, tokenizer = load_model(str(path))
        ids, differ = tokenizer(Path("README.md").read_text(encoding="utf-8")).input_ids[:tokens], []
        with folders() as (drive, store):
            seconds(model, ids[:cut], "full", drive, store)  # the piece: in bf16 rounding depends on a pass's length
            for system in LATE:
                options, answers = options_of(system, drive), []
                for own in (None, store):
                    with make_cache(model, system, own, **options) as cache:
                        for part in [ids] if own else (ids[:cut], ids[cut:]):
                            feed(model, cache, part)
                        answers.append(decode(model, cache, [*ids, ids[0]], 16).tolist())
                        opened = own and cache.run.keeper.report.opened
                if answers[0] != answers[1] or opened != cut:
                    differ.append(system)
        text = f"{path.name}, {tokens:,} tokens, {cut:,} from the store: systems whose answer of 16 tokens differs"
        figure = f"{len(differ)} of {len(LATE)} {' '.join(differ)}"
        claims.append(Claim(text, figure, "0", not differ).show())
    return claims


def seconds(model, ids: list[int], system: str, drive: Path, store: PrefixStore | None = None) -> tuple:
    """From a prompt to its logits; of that, to open what the store has; and the bytes read from it."""
    with make_cache(model, system, store, **options_of(system, drive)) as cache:
        start = time.perf_counter()
        feed(model, cache, ids)
        took, report = time.perf_counter() - start, store and cache.run.keeper.report
        return (took, report.seconds, report.nbytes) if report else (took, 0.0, 0)


def faster(tokens: int, systems: list[str], bar: float, rounds: int) -> list[Claim]:
    """A prompt of whole blocks and two tokens more: prefilled, and opened from a store."""
    model, tokenizer = load_embedded()
    ids, claims = document(tokenizer, tokens // BLOCK * BLOCK + 2), []
    kv = sum(part.nbytes for part in kv_of(model, ids[:BLOCK])) // BLOCK * (len(ids) - 2)
    with folders() as (drive, store):
        seconds(model, ids, "full", drive, store)
        for system in systems:
            fresh = statistics.median(seconds(model, ids, system, drive)[0] for _ in range(rounds))
            found = [seconds(model, ids, system, drive, store) for _ in range(ROUNDS)]
            whole, opened = (statistics.median(part) for part in list(zip(*found, strict=True))[:2])
            text = f"{system}: {len(ids):,} tokens prefilled in {fresh:.2f} s, opened in {opened:.3f} s"
            figure = f"{fresh / opened:.0f} x faster; with the pass over the last two tokens {fresh / whole:.0f} x"
            claims.append(Claim(text, figure, f"opened {bar:.0f} x", fresh / opened >= bar).show())
        read = found[0][2] / kv
        claims.append(Claim("bytes read over the KV of the opened tokens", f"{read:.2f}", "1", read == 1).show())
        text = "hillinfer: bytes written to its drive to open the prompt, which it reads in the store"
        written = copied(model, ids, drive, store)
        claims.append(Claim(text, f"{written:,}", "0", written == 0).show())
        half = (len(ids) // 2 // BLOCK) * BLOCK
        rests = [ids[half:][turn + 1 :] + ids[half:][: turn + 1] for turn in range(ROUNDS)]  # new to the store
        pairs = [
            (seconds(model, ids, "full", drive), seconds(model, ids[:half] + rest, "full", drive, store))
            for rest in rests
        ]
    share = statistics.median(part[0] / whole[0] for whole, part in pairs)
    read = pairs[-1][1][2] / kv * (len(ids) - 2) / half
    text = "half of the prompt known: time over the whole prefill's, and bytes read over the KV of that half"
    return [*claims, Claim(text, f"{share:.2f}, {read:.2f}", "0.80, 1", share <= 0.8 and read == 1).show()]


def copied(model, ids: list[int], drive: Path, store: PrefixStore) -> int:
    with make_cache(model, "hillinfer", store, **options_of("hillinfer", drive)) as cache:
        cache.run.keeper.open(ids)
        return sum(span.bytes for span in cache.timeline.spans if span.kind == "write")


def kv_of(model, ids: list[int]) -> list[torch.Tensor]:
    cache = DynamicCache(config=model.config)
    feed(model, cache, ids)
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def keeping(tokens: int = 4096) -> list[Claim]:
    """What keeping adds to a prefill, in turns with one without a store; and until the disk has all of it."""
    model, tokenizer = load_embedded()
    ids, without, kept, settled = document(tokenizer, tokens), [], [], []
    for _ in range(5):
        with folders() as (drive, store):
            without.append(seconds(model, ids, "full", drive, None)[0])
            with make_cache(model, "full", store) as cache:
                start = time.perf_counter()
                feed(model, cache, ids)
                kept.append(time.perf_counter() - start)
                cache.run.keeper.settle()
                settled.append(time.perf_counter() - start)
    base, own, whole = (statistics.median(part) for part in (without, kept, settled))
    text = (
        f"keeping {tokens:,} tokens: prefill {base:.2f} s without, {own:.2f} s with a store ({whole:.2f} s to the disk)"
    )
    return [Claim(text, f"{own / base - 1:+.1%}", "+5 %", own <= 1.05 * base).show()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--parts", default="processes,tests,real,8k,32k,keeping")
    words = parser.parse_args()
    parts = {
        "processes": processes,
        "tests": suite,
        "real": lambda: real(words.models),
        "8k": lambda: faster(8000, LATE, 20, ROUNDS),
        "32k": lambda: faster(32_000, ["full", "hillinfer"], 40, 1),
        "keeping": keeping,
    }
    claims = []
    for part in words.parts.split(","):
        claims += parts[part]()
        if part != "tests":
            torch.set_num_threads(os.cpu_count() or 1)
    print(machine())
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
