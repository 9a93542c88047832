"""Exact decoding against the full cache in random runs: python -m benchmarks.exact_runs --runs 300 [--model NAME ...]

Systems that can draft, tiers, lengths and settings are drawn as in benchmarks.soak, the length of each draft as well.
Where the full model's two best logits lie within rounding of each other, a difference is a tie and counted apart.
"""

import argparse
import random
import tempfile
from dataclasses import dataclass, field
from unittest import mock

import torch

from benchmarks.soak import models, setting
from hillinfer.errors import UsageError
from hillinfer.loading import load_model
from hillinfer.speculative import Pace, check_draft, describe_rounds, exact
from hillinfer.systems.registry import list_systems, make_cache

LONGEST = 12  # tokens of a draft, at most
ROUNDING = 1e-4  # relative


@dataclass
class Found:
    runs: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        differ = f"{len(self.wrong)} differ, {self.ties} more at a tie"
        return f"{self.runs} runs, {differ}; {describe_rounds(self.rounds)}"


def draw(rng: random.Random, drive: str) -> tuple[str, dict]:
    """A system that can draft, and its options."""
    while True:
        name, options, _ = setting(rng, drive)
        try:
            check_draft(list_systems()[name].policy)
        except UsageError:
            continue
        return name, options


@torch.inference_mode()
def compare(candidates: list, runs: int, seed: int = 0, longest: int = 300, most: int = 60) -> Found:
    """Greedy answers of `runs` random runs over these models, to random prompts of 20 to `longest` tokens."""
    rng, found = random.Random(seed), Found(runs)
    redraw = mock.patch.object(Pace, "note", lambda pace, *_: setattr(pace, "gamma", rng.randrange(LONGEST + 1)))
    with tempfile.TemporaryDirectory() as drive, redraw:
        for run in range(runs):
            model, (name, options) = rng.choice(candidates), draw(rng, drive)
            ids = torch.tensor([[rng.randrange(5, 90) for _ in range(rng.randrange(20, longest))]])
            words = dict(attention_mask=torch.ones_like(ids), max_new_tokens=rng.randrange(1, most), do_sample=False)
            with make_cache(model, "full") as cache:
                want = model.generate(ids, past_key_values=cache, **words)
            with make_cache(model, name, **options) as cache:
                out = model.generate(ids, past_key_values=cache, custom_generate=exact, **words)
                found.rounds += cache.counters.rounds
            if not torch.equal(out, want):
                if tie(model, want, out):
                    found.ties += 1
                else:
                    found.wrong.append(f"run {run}: {name} {options}, {ids.shape[1]} tokens")
    return found


def tie(model, want: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the full model's two best logits are equal, up to rounding, where the two sequences part."""
    n = min(want.shape[1], out.shape[1])
    differ = (want[0, :n] != out[0, :n]).nonzero()
    if not len(differ):
        return False
    best = model(want[:, : int(differ[0])]).logits[0, -1].float().topk(2).values
    return bool(best[0] - best[1] <= ROUNDING * best[0].abs())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--model", action="append", default=[], help="embedded, or a folder; by default tiny models")
    words = parser.parse_args()
    candidates = [load_model(name)[0] for name in words.model] or models()
    found = compare(candidates, words.runs)
    print(found, *found.wrong, sep="\n")
    return int(bool(found.wrong))


if __name__ == "__main__":
    raise SystemExit(main())
