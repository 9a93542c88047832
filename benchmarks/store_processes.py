"""Processes that share a prefix store: killed by SIGKILL, reading at once, writing the same, within the quota.

    python -m benchmarks.store_processes --kills 300

Children are forked from a single-threaded process with a tiny model. They answer prompts that share beginnings, over a
store whose quota holds half of them, and must answer as without a store.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kills import forked, told
from benchmarks.tiny_models import build
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.reading import check
from hillinfer.systems.registry import make_cache

BLOCK, SHARED, OWN, NEW = 32, 128, 96, 6  # tokens of a block, of a beginning, of the rest and of an answer
ROOM = 21  # blocks that the quota holds, of 39


class Bench:
    """A tiny model, and nine prompts with their answers. Three prompts each begin alike."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)  # fork needs a single-threaded process
        torch.manual_seed(5)
        self.model, self.folder, self.quota = build("llama"), folder, None
        heads, rests = torch.randint(3, 97, (3, SHARED)), torch.randint(3, 97, (9, OWN))
        self.prompts = [torch.cat((heads[i // 3], rests[i]))[None] for i in range(9)]
        self.want = [self.answer(i) for i in range(9)]
        self.answer(0, self.store)
        self.blocks = len(self.store.blocks())
        self.quota = ROOM * self.store.blocks()[0].nbytes

    @property
    def store(self) -> PrefixStore:
        return PrefixStore(self.folder, self.quota, BLOCK)

    def answer(self, number: int, store: PrefixStore | None = None) -> list[int]:
        ids = self.prompts[number]
        settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
        with make_cache(self.model, "full", store) as cache:
            return self.model.generate(ids, past_key_values=cache, **settings)[0, ids.shape[1] :].tolist()

    def work(self, say: Callable[[str], None], numbers: list[int]) -> None:
        """Answer these prompts; say `.` for a right answer."""
        warnings.simplefilter("ignore")  # blocks that another process has just removed, and the quota
        for number in numbers:
            say("." if self.answer(number, self.store) == self.want[number] else "x")

    def fork(self, numbers: list[int]) -> tuple[int, int]:
        return forked(lambda say: self.work(say, numbers))

    def drafts(self) -> int:
        return len(list(self.folder.glob(".block-*")))

    def used(self) -> int:
        return sum(file.nbytes for file in self.store.files())


def kill(kills: int, seed: int = 0) -> Counter:
    """Kill two children at a time. Counts of right and wrong answers, orphans, damaged blocks, excesses."""
    rng, found = random.Random(seed), Counter(killed=kills)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        for _ in range(kills // 2):
            pair = [bench.fork([rng.randrange(9) for _ in range(1000)]) for _ in range(2)]
            for _, pipe in pair:
                os.read(pipe, 1)  # at work
            time.sleep(rng.random() * 0.1)
            for pid, _ in pair:
                os.kill(pid, signal.SIGKILL)
            said = "".join(told(*child) for child in pair)
            found["orphans"] += bench.drafts()
            said += told(*bench.fork([rng.randrange(9) for _ in range(3)]))
            found["right"] += said.count(".")
            found["wrong"] += len(said) - said.count(".")
            found["orphans left"] += bench.drafts()
            found["damaged"] += sum(bool(check(block.path)) for block in bench.store.blocks())
            found["above the quota"] += bench.used() > bench.quota
    return found


def read(count: int = 10) -> int:
    """How many of `count` processes at once answer rightly from one store."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        children = [bench.fork([0] * 10) for _ in range(count)]
        return sum(told(*child) == "." * 10 for child in children)


def write(rounds: int = 20) -> tuple[int, int]:
    """Two processes write the same prompt to an empty store: in how many rounds of all was there one copy?"""
    with tempfile.TemporaryDirectory() as name:
        bench, single = Bench(Path(name)), 0
        for _ in range(rounds):
            bench.store.prune(0)
            said = [told(*child) for child in [bench.fork([0]), bench.fork([0])]]
            single += said == [".", "."] and (len(bench.store.blocks()), bench.drafts()) == (bench.blocks, 0)
        return single, rounds


def fill(seconds: float = 10.0) -> float:
    """The store's largest size over its quota, watched while two processes fill and evict."""
    with tempfile.TemporaryDirectory() as name:
        bench, most = Bench(Path(name)), 0
        children = [bench.fork([(start + i) % 9 for i in range(100_000)]) for start in (0, 4)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            most = max(most, bench.used())
        for pid, _ in children:
            os.kill(pid, signal.SIGKILL)
        for child in children:
            told(*child)
        return most / bench.quota


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--kills", type=int, default=300)
    found = kill(words.parse_args().kills)
    print(json.dumps(found, indent=1))
    return int(any(found[name] for name in ("wrong", "orphans left", "damaged", "above the quota")))


if __name__ == "__main__":
    sys.exit(main())
