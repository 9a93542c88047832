"""Teacher forcing: the reference answer fed token by token to several systems over one shared prefill."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.cache import TieredCache
from hillinfer.longbench.prompts import Prompt
from hillinfer.longbench.runner import Answer, measured, prefill
from hillinfer.longbench.sweep import timed
from hillinfer.systems.registry import list_systems, make_cache


@dataclass(frozen=True)
class Forced:
    """What one system makes of a reference answer of A tokens.

    right     every token of the answer is the most likely one: a greedy answer begins with it
    kl        KL divergence of the first variant's next-token distribution to this one's, mean over the A tokens
    agree     share of the A tokens at which the most likely token is the first variant's
    cache     closed, with its timeline and counters
    """

    variant: str
    answer: Answer
    right: bool
    kl: float
    agree: float
    cache: TieredCache


@torch.inference_mode()
def force(model: PreTrainedModel, cache: TieredCache, question: list[int], gold: list[int]) -> torch.Tensor:
    """Log-probabilities (A, vocabulary) of the tokens after the question, the answer `gold` forced upon the model."""
    logits = []
    for token in question + gold[:-1]:
        step = torch.tensor([[token]], device=model.device)
        logits.append(model(step, past_key_values=cache).logits[0, -1])
    return torch.stack(logits[-len(gold) :]).float().log_softmax(-1)


def force_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    gold: list[int],
    variants: dict[str, tuple[str, dict]],
) -> Iterator[Forced]:
    """One answer forced on every variant, a system and its options. The first is what the others are compared with.

    The document is prefilled once, exactly; each variant then takes the question token by token.
    """
    policies = {list_systems()[system].policy for system, _ in variants.values()}
    source, prefill_s = timed(prefill, model, prompt, None, [policy for policy in policies if policy.watches])
    ids, first = torch.tensor(gold, device=model.device), None
    for name, (system, options) in variants.items():
        with make_cache(model, system, **options) as cache:
            source.fill(cache, model.device)
            cache.timeline.clear()  # the figures cover decode steps only
            cache.counters.clear()
            logp, decode_s = timed(force, model, cache, prompt.ids[prompt.document :], gold)
            figures = measured(cache, prefill_s, decode_s)
        first = logp if first is None else first
        likely = logp.argmax(-1)
        answer = Answer(tokenizer.decode(likely), len(prompt.ids), len(gold), **figures)
        kl = (first.exp() * (first - logp)).sum(-1).mean().item()
        agree = (likely == first.argmax(-1)).float().mean().item()
        yield Forced(name, answer, torch.equal(likely, ids), kl, agree, cache)
