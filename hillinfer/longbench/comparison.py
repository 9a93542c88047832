"""Compare systems side by side on the same long-context questions."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.assets import data_folder
from hillinfer.cache import TieredCache
from hillinfer.longbench.forced import force_each
from hillinfer.longbench.needles import needle_prompt
from hillinfer.longbench.runner import Answer, ask, is_right, synthetic_prompt
from hillinfer.longbench.synthetic import load_records, partial_key_floor
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system, make_cache, options_of

SYSTEMS = ("full", "streaming", "hillinfer")
QUESTIONS = {"lines_2k": 12, "needle_2k": 8, "lines_4k": 4}  # task file: number of questions in the demo


@dataclass
class Result:
    """One system's answers. `right[i]` says whether `answers[i]` is correct; `kl` and `agree` are those of `Forced`."""

    system: str
    answers: list[Answer] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    cache: TieredCache | None = None  # cache of the last question: closed, with its timeline and counters

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.right)

    def mean(self, name: str) -> float:
        return statistics.fmean(getattr(answer, name) for answer in self.answers)

    def median(self, name: str) -> float:
        return statistics.median(getattr(answer, name) for answer in self.answers)

    def rate(self, tier: str) -> float:
        """Mean share of the attended tokens served by this tier."""
        return statistics.fmean(answer.rates[tier] for answer in self.answers)

    def memory(self) -> int:
        """KV bytes in memory, the largest over the questions: records on device and host, key codes, hit table."""
        return max(answer.memory_bytes for answer in self.answers)


def demo_records(wanted: dict[str, int] = QUESTIONS) -> list[dict]:
    """The first records of the bundled task files; `wanted` maps each file to its number of records."""
    folder = data_folder("tasks")
    return [record for name, n in wanted.items() for record in load_records(folder / f"{name}.jsonl")[:n]]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict],
    systems: Iterable[str],
    settings: dict,
    each: Callable[[Result], None] = lambda result: None,
    seen: bool = False,
    exact: bool = False,
) -> list[Result]:
    """Ask every system every question. Systems take turns, so machine noise affects all of them alike.

    settings  fields of `Settings`; `full` keeps all KV in memory, the others use the drive if one is configured
    each      callback after each answer, once the cache is closed; receives the system's result so far
    seen      prefill the question together with the document
    exact     systems that select draft, and all KV verifies

    Raises UsageError before the first question if a system cannot run or a prompt exceeds the model's context window.
    """
    chosen = {name: options_of(name, settings) for name in systems}
    prompts = [synthetic_prompt(tokenizer, record) for record in records]
    _plan(model, chosen, max(len(prompt.ids) + task.max_new_tokens for task, prompt in prompts))
    results = [Result(name) for name in chosen]
    for record in records:
        for result in results:
            with make_cache(model, result.system, **chosen[result.system]) as result.cache:
                drafts = exact and not result.cache.run.policy.exact
                answer = ask(model, tokenizer, record, result.cache, seen, drafts)
            result.answers.append(answer)
            result.right.append(is_right(record, answer.text))
            each(result)
    return results


def compare_forced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict],
    systems: Iterable[str],
    settings: dict,
    each: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """`compare` for records of `make_needles`: all systems answer over one prefill, and their fidelity is measured.

    `full`, which the others are compared with, comes first, named or not.
    """
    chosen = {name: options_of(name, settings) for name in ("full", *systems)}
    prompts = [needle_prompt(tokenizer, record) for record in records]
    _plan(model, chosen, max(len(prompt.ids) + len(gold) for prompt, gold in prompts))
    results = {name: Result(name) for name in chosen}
    for prompt, gold in prompts:
        for forced in force_each(model, tokenizer, prompt, gold, {name: (name, chosen[name]) for name in chosen}):
            result = results[forced.variant]
            result.cache = forced.cache
            for name in ("right", "kl", "agree"):
                getattr(result, name).append(getattr(forced, name))
            result.answers.append(forced.answer)
            each(result)
    return list(results.values())


def _plan(model: PreTrainedModel, chosen: dict[str, dict], tokens: int) -> None:
    """UsageError if one of the systems, given its options, cannot run with that many tokens."""
    for name, options in chosen.items():
        system, settings = find_system(name, options)
        plan(model.config, settings, tokens, model.dtype, policy=system.policy, device=model.device)


def floor(records: Sequence[dict]) -> float:
    """Expected accuracy of guessing among the entries that share half of the queried key."""
    return statistics.fmean(partial_key_floor(record) for record in records)
