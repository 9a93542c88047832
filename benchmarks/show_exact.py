"""Every claim about exact decoding, measured again: make show-exact MODELS=FOLDER ROWS=FOLDER DRIVE=FOLDER

MODELS holds models, each in a folder of its own or its `hf`, the first of which drafts its own long answers to
LongBench rows; DRIVE is a folder on the drive, with 20 GB free for the 8B shape at 32K. About two hours on two cores.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from transformers.utils import logging

from benchmarks.claims import Claim, tests, verdict
from benchmarks.exact_runs import compare
from benchmarks.exact_shape import costs, hostile, opened, race
from benchmarks.shape import ALPHA
from benchmarks.soak import models as tiny_models
from benchmarks.stack import SHAPES, Field
from benchmarks.trace import record
from hillinfer.assets import load_embedded, machine
from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.evaluator.policies import TopK
from hillinfer.loading import load_model
from hillinfer.longbench.job import prompt_of
from hillinfer.longbench.runner import prefill
from hillinfer.longbench.sources import load_all
from hillinfer.speculative import Pace, exact

ALPHAS, TEMPERATURE = (0.2, 0.1, 0.05), 0.7
TASKS = ("gov_report", "qmsum", "repobench-p")
STEPS = 48  # of the recorded selections


def folders(models: Path) -> list[str]:
    return sorted(str(path.parent) for path in (*models.glob("*/config.json"), *models.glob("*/hf/config.json")))


def equal(models: list[str], runs: int) -> list[Claim]:
    """Greedy tokens of exact decoding and of `full`; real models in fp32, and fewer runs of them."""
    ways = {"tiny models": (tiny_models, runs), "the embedded model": (lambda: [load_embedded()[0]], runs // 3)}
    ways |= {Path(name).name: (lambda name=name: [load_model(name, "float32")[0]], runs // 10) for name in models[:2]}
    claims = []
    for name, (load, count) in ways.items():
        found = compare(load(), max(1, count))
        claims.append(Claim(f"{name}: the full cache's tokens", str(found), "0 differ", not found.wrong).show())
    return claims


def acceptance(model, prompts: list, alpha: float, cost: tuple[float, float], temperature: float = 0.0) -> list:
    """Drafted and accepted tokens of each round on the model's own answers, (task, prompt, prefilled) each.

    cost  seconds of a drafted token and of a pass, by which the length of a draft is chosen
    """
    rounds, note = [], Pace.note
    draft_s, pass_s = cost
    paced = mock.patch.object(
        Pace, "note", lambda pace, n, own, _, __, sure: note(pace, n, own, n * draft_s, pass_s, sure)
    )
    sampled = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
    for task, prompt, source in prompts:
        ids = torch.tensor([prompt.ids], device=model.device)
        with paced, TieredCache(model.config, TopK, Settings(alpha=alpha)) as cache:
            source.fill(cache, model.device)
            words = dict(past_key_values=cache, max_new_tokens=task.max_new_tokens, custom_generate=exact, **sampled)
            model.generate(ids, attention_mask=torch.ones_like(ids), **words)
            rounds += cache.counters.rounds
    return rounds


def prefilled(model, tokenizer, rows: Path, lengths: list[int], new_tokens: int) -> list:
    """The longest row of each task, cut to each length, and its document's KV."""
    found = []
    for task, records, _ in load_all(TASKS, [rows], "main"):
        longest = max(records, key=lambda row: len(row["context"]))
        for tokens in lengths:
            prompt = prompt_of(task, longest, model.config, tokenizer, tokens)
            own = replace(task, max_new_tokens=new_tokens)
            found.append((own, prompt, prefill(model, prompt, 2048)))
            print(f"{task.name}: {len(prompt.ids)} tokens prefilled", flush=True)
    return found


def shares(rounds: list) -> tuple[float, float]:
    """Accepted tokens as a share of the drafted ones, and tokens of a pass."""
    drafted, accepted = map(sum, zip(*rounds, strict=True))
    return accepted / max(1, drafted), 1 + accepted / len(rounds)


def fastest(model, prompts: list, cost: dict) -> tuple[float, list, list[Claim]]:
    """The alpha whose drafts give the shortest time per token at this cost; its rounds; and claims about them."""
    found, ms = {}, {}
    for alpha, (draft_s, pass_s) in cost.items():
        rounds = found[alpha] = acceptance(model, prompts, alpha, cost[alpha])
        share, each = shares(rounds)
        ms[alpha] = 1e3 * (statistics.mean(drafted for drafted, _ in rounds) * draft_s + pass_s) / each
        costly = f"{1e3 * draft_s:.0f} ms a draft, {1e3 * pass_s:.0f} a pass, {ms[alpha]:.0f} a token"
        print(f"alpha {alpha}: {costly}; {share:.3f} accepted, {each:.1f} tokens a pass", flush=True)
    alpha = min(ms, key=ms.get)
    (share, each), text = shares(found[alpha]), f"{len(prompts)} own answers, drafted at alpha {alpha}"
    claims = [
        Claim(f"{text}: drafted tokens that are accepted", f"{share:.3f}", "0.96", share >= 0.96).show(),
        Claim(f"{text}: tokens of a verifying pass", f"{each:.1f}", "16", each >= 16).show(),
    ]
    share, each = shares(acceptance(model, prompts, alpha, cost[alpha], TEMPERATURE))
    print(f"sampled at temperature {TEMPERATURE}: {share:.3f} accepted, {each:.1f} tokens a pass", flush=True)
    return alpha, found[alpha], claims


def speed(words, model, tokenizer) -> list[Claim]:
    """Acceptance on the real model at the costs of the large shape, and the race at that acceptance."""
    field = Field(SHAPES[words.shape], record(words.trace), words.tokens, words.steps)
    with (
        torch.inference_mode(),
        tempfile.TemporaryDirectory(dir=words.drive) as folder,
        opened(field, ALPHAS, Path(folder)) as stacks,
    ):
        cost = {alpha: costs(stacks[alpha]) for alpha in ALPHAS}
        prompts = prefilled(model, tokenizer, words.rows, words.lengths, words.new_tokens)
        alpha, rounds, claims = fastest(model, prompts, cost)
        own, plain, flexgen = race(stacks, alpha, rounds, words.turns)
        losing, beside = hostile(stacks)
    print(f"exact {1e3 * own:.0f} ms a token, hillinfer {1e3 * plain:.0f}, flexgen {1e3 * flexgen:.0f}", flush=True)
    for other, ratio, bar in (
        ("flexgen at equal memory", flexgen / own, 4.5),
        (f"hillinfer at {ALPHA} that nothing verifies", plain / own, 0.85),
        ("flexgen if no draft is accepted", beside / losing, 0.9),
    ):
        text = f"{words.shape} shape, {words.tokens} tokens on the drive: times as fast as {other}"
        claims.append(Claim(text, f"{ratio:.2f}", str(bar), ratio >= bar).show())
    return claims


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("drive", type=Path)
    parser.add_argument("--parts", default="equal,sampling,speed")
    parser.add_argument("--runs", type=int, default=300, help="random runs of tiny models")
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the recorded selections")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4000, 8000, 15_500], help="of the real prompts")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--trace", type=Path, default=Path("out/trace.npz"), help="recorded if missing")
    words = parser.parse_args()
    logging.disable_progress_bar()
    words.drive.mkdir(parents=True, exist_ok=True)
    models, distribution = folders(words.models), "tests/test_exact.py"
    parts = {
        "equal": lambda: equal(models, words.runs),
        "sampling": lambda: [tests("samples: chi-square", distribution, "-k", "distribution").show()],
        "speed": lambda: speed(words, *load_model(models[0])),
    }
    claims = [claim for part in words.parts.split(",") for claim in parts[part]()]
    print(machine())
    return verdict(claims)


if __name__ == "__main__":
    raise SystemExit(main())
