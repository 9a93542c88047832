"""A reference answer forced on several systems over one prefill: would each give it, how closely, at what cost?"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.cache import TieredCache
from hillinfer.longbench.fidelity import closeness, steps
from hillinfer.longbench.prompts import Prompt
from hillinfer.longbench.runner import Answer, feed, measured, prefill
from hillinfer.models.rows import as_batch
from hillinfer.systems.registry import list_systems, make_cache


@dataclass(frozen=True)
class Forced:
    """One system on an answer of A tokens.

    right     every token of the answer is the most likely one: a greedy answer begins with it
    kl        KL divergence of the first variant's next-token distribution to this one's in nats, mean over A
    agree     share of A at which the most likely token is the first variant's
    cache     closed, with its timeline and counters
    """

    variant: str
    answer: Answer
    right: bool
    kl: float
    agree: float
    cache: TieredCache


def force_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    gold: list[int],
    variants: dict[str, tuple[str, dict]],
    together: bool = False,
) -> Iterator[Forced]:
    """One answer forced on every variant, a system and its options. The first is what the others are compared with.

    The document is prefilled once, exactly; the question is fed token by token. One variant after the other has times
    of its own; `together`, as rows of one decode, they take a fraction of the time.
    """
    policies, start = {list_systems()[system].policy for system, _ in variants.values()}, time.perf_counter()
    source = prefill(model, prompt, policies=[policy for policy in policies if policy.watches])
    prefill_s, wanted, first = time.perf_counter() - start, torch.tensor(gold, device=model.device), None
    for group in [list(variants)] if together else [[name] for name in variants]:
        found = []
        with ExitStack() as stack:
            caches = [stack.enter_context(make_cache(model, variants[name][0], **variants[name][1])) for name in group]
            for cache in caches:
                source.fill(cache, model.device)
                cache.timeline.clear()  # the figures cover decode steps only
                cache.counters.clear()
            start = time.perf_counter()
            logp = _force(model, caches, prompt.ids[prompt.document :], gold)
            decode_s, first = time.perf_counter() - start, logp[0] if first is None else first
            likely, (kl, agree) = logp.argmax(-1), closeness(first, logp)
            for row, (name, cache) in enumerate(zip(group, caches, strict=True)):
                figures = measured(cache, prefill_s, decode_s)
                answer = Answer(tokenizer.decode(likely[row]), len(prompt.ids), len(gold), **figures)
                close = kl[row].mean().item(), agree[row].float().mean().item()
                found.append(Forced(name, answer, torch.equal(likely[row], wanted), *close, cache))
        yield from found


@torch.inference_mode()
def _force(model: PreTrainedModel, caches: Sequence[TieredCache], question: list[int], gold: list[int]) -> torch.Tensor:
    """Log-probabilities (B, A, V) of the tokens after the question, in all B caches."""
    with as_batch(caches) as rows:
        for token in question[:-1]:
            feed(model, rows, [token], batch=len(caches))
        return torch.stack([logp for logp, _ in steps(model, rows, len(caches), question[-1], gold, len(gold))], 1)
