"""Exact decoding: a selection drafts tokens, all of the KV verifies them, and the output is what `full` would say.

    model.generate(**inputs, past_key_values=cache, custom_generate=hillinfer.exact)

A pass of several tokens is exact in every system, so one pass of gamma + 1 queries checks gamma drafted tokens, and one
read of all KV serves as many tokens as it accepts (Leviathan et al., arXiv 2211.17192; the draft is the model itself
with sparse attention). Greedy output equals `full`'s up to rounding; sampled output has the full model's distribution.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from hillinfer.cache import TieredCache
from hillinfer.errors import UsageError
from hillinfer.evaluator.policy import Policy

LONGEST = 64  # tokens of a draft
REST = 16  # rounds without drafts, once these do not pay
KEEP = 0.8  # weight of the past in running means
LEVELS = 10  # of a draft's doubt about its token: probabilities below 1/2, 3/4, 7/8, ...
PRIOR, DOUBT = 10, 0.3  # tokens of each level before any was judged, and the share of the first level not accepted


@dataclass
class Pace:
    """Chooses the length of a draft: the least measured time per token, for the acceptance of the last rounds.

    Within a round a draft ends where one more token is not worth its time, as all before it are probably not accepted:
    by what became of tokens that the draft was as sure of.
    """

    draft_s: float = 0.0  # of one drafted token
    verify_s: float = 0.0  # of one pass over all KV
    accepted: float = 0.9  # share of drafted tokens
    tried: float = 3.0  # tokens that this is the mean of, the older ones in part; its start counts as three
    gamma: int = 8
    resting: int = 0  # rounds left without drafts
    said: bool = False
    round_s: float = 0.0
    tokens: float = 0.0  # of a round
    judged: list[list[float]] = field(
        default_factory=lambda: [[PRIOR * (1 - DOUBT * 0.5**level), PRIOR] for level in range(LEVELS)]
    )  # accepted and all, by level

    def chance(self, sure: float) -> float:
        """That a drafted token is accepted to which the draft gave this probability."""
        accepted, all_ = self.judged[_level(sure)]
        return accepted / all_

    def goes_on(self, drafted: int, alive: float) -> bool:
        """Whether to draft another token after these, which are all accepted with probability `alive`."""
        if self.resting or not self.draft_s:
            return drafted < self.gamma
        worth = alive * self.accepted * self.round_s / self.tokens
        return self.gamma > 0 and drafted < LONGEST and worth > self.draft_s

    def note(self, drafted: int, accepted: int, draft_s: float, verify_s: float, sure: Sequence[float] = ()) -> None:
        """A round is over: choose the next one's draft. `sure` are the probabilities of the drafted tokens."""
        self.verify_s = _mean(self.verify_s, verify_s)
        self.round_s, self.tokens = _mean(self.round_s, draft_s + verify_s), _mean(self.tokens, accepted + 1)
        for place, probability in enumerate(sure[: accepted + 1]):  # those after the first wrong one were not judged
            level = self.judged[_level(probability)]
            level[0], level[1] = level[0] + (place < accepted), level[1] + 1
        if drafted:
            self.draft_s = _mean(self.draft_s, draft_s / drafted)
            tried = min(drafted, accepted + 1)
            self.tried = KEEP ** (tried / 4) * self.tried + tried
            self.accepted += (accepted - tried * self.accepted) / self.tried
        if self.resting:
            self.resting -= 1
            self.gamma = 0 if self.resting else 2
            return
        self.gamma = min(range(LONGEST + 1), key=self.seconds_per_token)
        if self.gamma == 0:
            if not self.said:
                why = f"{self.accepted:.0%} of the drafted tokens are accepted, which does not pay here"
                warnings.warn(f"{why}: most tokens are now read for one by one", stacklevel=4)
            self.resting, self.said = REST, True

    def seconds_per_token(self, gamma: int) -> float:
        share = min(self.accepted, 0.999)
        return (gamma * self.draft_s + self.verify_s) / ((1 - share ** (gamma + 1)) / (1 - share))


def _level(sure: float) -> int:
    return min(int(-math.log2(1 - sure + 0.5**LEVELS)), LEVELS - 1)


def _mean(before: float, new: float) -> float:
    return KEEP * before + (1 - KEEP) * new if before else new


def exact(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    **model_kwargs,
) -> torch.Tensor:
    """A decoding method for `generate(custom_generate=...)`; input_ids (1, n), returns the whole sequence.

    streamer  `generate` hands its own to no custom method: `custom_generate=partial(hillinfer.exact, streamer=...)`

    Raises UsageError for a cache or batch whose tokens could not be taken back.
    """
    cache = model_kwargs.get("past_key_values")
    _check(cache, input_ids, model_kwargs.get("attention_mask"))
    rounds = Rounds(model, cache, logits_processor, generation_config.do_sample)
    ids, done = input_ids, False
    new, _ = rounds.choose(ids, rounds.verify(ids[0, cache.get_seq_length() :], last=True))
    accepted = [new]
    try:
        while not done:
            for token in accepted:
                ids = torch.cat((ids, token.view(1, 1)), 1)
                if streamer is not None:
                    streamer.put(token.view(1).cpu())
                if done := bool(stopping_criteria(ids, None).all()):
                    break
            if not done:
                accepted = rounds.next(ids, generation_config.max_length - ids.shape[1] - 1)
    finally:  # in mid-round too the cache is left as by `generate`: without the newest token
        cache.crop(ids.shape[1] - 1)
    if streamer is not None:
        streamer.end()
    return ids


class Rounds:
    """Drafts and verifies over a cache that holds all tokens but the newest."""

    def __init__(self, model: PreTrainedModel, cache: TieredCache, processor, sample: bool):
        self.model, self.cache, self.processor, self.sample, self.pace = model, cache, processor, sample, Pace()

    def next(self, ids: torch.Tensor, most: int) -> list[torch.Tensor]:
        """The tokens after ids (1, n) that all KV agrees to, at least one; at most `most` are drafted."""
        held, start, first = self.cache.get_seq_length(), time.perf_counter_ns(), self.cache.timeline.step + 1
        drafted, guessed, sure, longer, alive = [], [], [], ids, 1.0
        while len(drafted) < most and self.pace.goes_on(len(drafted), alive):
            logits = self.model(longer[:, -1:], past_key_values=self.cache).logits[:, -1]
            token, probabilities = self.choose(longer, logits)
            drafted, guessed = [*drafted, token], [*guessed, probabilities]
            longer = torch.cat((longer, token.view(1, 1)), 1)
            sure.append(float((logits.float().softmax(-1) if probabilities is None else probabilities).max()))
            alive *= self.pace.chance(sure[-1])
        self.cache.crop(held)
        middle = time.perf_counter_ns()
        logits, found = self.verify(longer[0, ids.shape[1] - 1 :]), []
        for step, (token, probabilities) in enumerate([*zip(drafted, guessed, strict=True), (None, None)]):
            own, fits = self.judge(longer[:, : ids.shape[1] + step], logits[step : step + 1], token, probabilities)
            found.append(own)
            if not fits:
                break
        self.cache.crop(held + len(found))
        end, lane = time.perf_counter_ns(), "cpu" if self.model.device.type == "cpu" else "gpu"
        self.cache.timeline.add(lane, "draft", -1, first, start, middle)
        self.cache.timeline.add(lane, "verify", -1, self.cache.timeline.step, middle, end)
        self.cache.counters.rounds.append((len(drafted), len(found) - 1))
        self.pace.note(len(drafted), len(found) - 1, (middle - start) / 1e9, (end - middle) / 1e9, sure)
        return found

    def verify(self, tokens: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Exact logits (k, V) after each of k tokens, or the last alone (1, V). The cache holds them from now on."""
        fed = tokens if len(tokens) > 1 else tokens.repeat(2)  # a single token would be a step of the selection
        kept = 1 if last and len(tokens) > 1 else 0  # 0 keeps all: a document's would not fit in memory
        logits = self.model(fed[None], past_key_values=self.cache, logits_to_keep=kept).logits[0]
        self.cache.crop(len(tokens) - len(fed))
        return logits[: 1 if last else len(tokens)]

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next token after ids by logits (1, V), and what it was drawn from."""
        scores = self.processor(ids, logits.float())
        if not self.sample:
            return scores.argmax(-1)[0], None
        probabilities = scores.softmax(-1)[0]
        return probabilities.multinomial(1)[0], probabilities

    def judge(self, ids: torch.Tensor, logits: torch.Tensor, drafted, guessed) -> tuple[torch.Tensor, bool]:
        """The full model's token after ids, and whether it is the drafted one: by rejection sampling if it samples."""
        token, true = self.choose(ids, logits)
        if drafted is None:
            return token, False
        if true is None:
            return token, bool(token == drafted)
        if torch.rand((), dtype=true.dtype, device=true.device) * guessed[drafted] <= true[drafted]:
            return drafted, True
        return (true - guessed).clamp(min=0).multinomial(1)[0], False


def _check(cache, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    if not isinstance(cache, TieredCache):
        raise UsageError("exact decoding drafts with a system's selection: pass past_key_values=make_cache(...)")
    if len(input_ids) != 1 or (mask is not None and not mask.all()):
        raise UsageError("exact decoding takes one sequence without padding at a time")
    check_draft(cache.run.policy)
    if len(cache.tiered) < cache.support.layers:
        raise UsageError("layers with a sliding window or a state cannot take drafted tokens back: use system full")


def describe_rounds(rounds: list[tuple[int, int]]) -> str:
    """Drafted and accepted tokens of each round, in a few words; none if there were no rounds."""
    if not rounds:
        return ""
    drafted, accepted = map(sum, zip(*rounds, strict=True))
    return f"accepted {accepted} of {drafted} drafted, {1 + accepted / len(rounds):.1f} tokens a pass"


def check_draft(policy: type[Policy]) -> None:
    """UsageError for a policy that cannot draft."""
    if policy.exact:
        raise UsageError(f"{policy.__name__} attends to all tokens already: it needs no exact decoding")
    if policy.watches:
        raise UsageError(
            f"{policy.__name__} learns from what it sees, which cannot be taken back: use hillinfer or topk"
        )
