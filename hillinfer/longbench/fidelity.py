"""How closely systems follow `full`: teacher-forced on the same answer, all as rows of one decode.

Scores give one noisy number per sample; here every token of an answer is a paired measurement.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.attention import Observed
from hillinfer.cache import TieredCache
from hillinfer.longbench.prompts import Prompt
from hillinfer.longbench.runner import ends_of, feed
from hillinfer.longbench.tasks import Task
from hillinfer.models.rows import as_batch

TOKENS = 64  # of an answer, at most
EVERY = 4  # steps between two for which the attention mass is measured, which reads all KV


@dataclass
class Fidelity:
    """One system on one answer; the lists hold a value per answer token."""

    kl: list[float] = field(default_factory=list)  # KL(full || system) of the next token's distribution, nats
    agree: list[int] = field(default_factory=list)  # 1 if the most likely token is full's
    nll: list[float] = field(default_factory=list)  # change of the answer token's negative log-likelihood, nats
    mass: float = 1.0  # attention mass on the attended tokens, mean over layers, heads and measured steps
    attended: float = 1.0  # attended tokens over cached ones


class Mass:
    """Observer of a run: the share of each head's exact attention mass that the attended tokens hold."""

    def __init__(self):
        self.first: int | None = None
        self.shares: list[float] = []

    def should_observe(self, layer: int, step: int) -> bool:
        self.first = step if self.first is None else self.first
        return (step - self.first) % EVERY == 0

    def observe(self, seen: Observed) -> None:
        self.shares.append(1.0 if seen.pick is None else float(seen.weights(True)[:, seen.pick].sum(1).mean()))


def reference_ids(
    tokenizer: PreTrainedTokenizerBase, task: Task, prompt: Prompt, answers: Sequence[str], tokens: int = TOKENS
) -> list[int]:
    """Token ids of the first reference answer, as it would follow the prompt."""
    last = tokenizer.decode(prompt.ids[-1:])
    space = " " if task.language == "en" and last and not last[-1].isspace() else ""
    return tokenizer(space + answers[0], add_special_tokens=False).input_ids[:tokens]


def closeness(full: torch.Tensor, logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(full || system) in nats, and whether the most likely token is the same, from log-probabilities (..., V)."""
    return (full.exp() * (full - logp)).sum(-1), logp.argmax(-1) == full.argmax(-1)


def force(
    model: PreTrainedModel,
    caches: Sequence[TieredCache],
    ids: Sequence[int],
    gold: Sequence[int] | None,
    tokens: int = TOKENS,
) -> list[Fidelity]:
    """Feed the rest of a prompt and an answer to all caches alike, and compare each step with the first cache's.

    caches  that hold the prompt up to `ids`; the first is the reference
    gold    token ids of the answer; None takes the reference system's own greedy one, up to its end
    """
    watchers, found, ends = [Mass() for _ in caches], [Fidelity() for _ in caches], ends_of(model)
    with as_batch(caches) as rows:
        for token in ids[:-1]:
            feed(model, rows, [token], batch=len(caches))
        for cache, watcher in zip(caches, watchers, strict=True):
            cache.counters.clear()
            cache.run.observer = watcher if cache.run.policy.selects else None
        for logp, token in steps(model, rows, len(caches), ids[-1], gold, tokens):
            (kl, agree), nll = closeness(logp[0], logp), logp[0, token] - logp[:, token]
            for row, each in enumerate(found):
                each.kl.append(round(float(kl[row]), 6))
                each.agree.append(int(agree[row]))
                each.nll.append(round(float(nll[row]), 6))
            if gold is None and token in ends:
                break
    for each, cache, watcher in zip(found, caches, watchers, strict=True):
        cache.run.observer = None
        each.mass = sum(watcher.shares) / len(watcher.shares) if watcher.shares else 1.0
        each.attended = cache.counters.total("attended") / max(1, cache.counters.total("cached")) / cache.run.heads
    return found


def steps(
    model: PreTrainedModel, rows: Cache, batch: int, token: int, gold: Sequence[int] | None, tokens: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode steps of all rows from `token` on: log-probabilities (B, V), and the token that all take next."""
    for step in range(tokens if gold is None else min(tokens, len(gold))):
        part = torch.full((batch, 1), token, dtype=torch.long, device=model.device)
        logp = model(part, past_key_values=rows, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        token = int(logp[0].argmax()) if gold is None else gold[step]
        yield logp, token
