"""The main job: the same long-context questions answered by several systems, side by side."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.assets import data_folder, machine  # noqa: F401 (imported from here by others)
from hillinfer.cache import TieredCache
from hillinfer.errors import UsageError
from hillinfer.longbench.runner import Answer, ask, is_right
from hillinfer.longbench.synthetic import load_records, partial_key_floor
from hillinfer.seam import disable, enable
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system, make_cache

SYSTEMS = ("full", "streaming", "hillinfer")
QUESTIONS = {"lines_2k": 12, "needle_2k": 8, "lines_4k": 4}  # how many of which tasks the demo asks


@dataclass
class Result:
    """One system's answers; `right` is parallel to them."""

    system: str
    answers: list[Answer]
    right: list[bool]
    cache: TieredCache  # of the last question, closed; its timeline and counters remain

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    def mean(self, name: str) -> float:
        return statistics.fmean(getattr(answer, name) for answer in self.answers)

    def median(self, name: str) -> float:
        return statistics.median(getattr(answer, name) for answer in self.answers)

    def rate(self, tier: str) -> float:
        return statistics.fmean(answer.rates[tier] for answer in self.answers)

    def memory(self) -> int:
        """KV bytes in memory: records on the device and in the host, key codes, hit table. The largest over the
        questions.
        """
        return max(sum(size for kind, size in answer.memory.items() if kind != "drive") for answer in self.answers)


def load_embedded(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that this project trained, and its tokenizer."""
    folder = data_folder("model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def demo_records(wanted: dict[str, int] = QUESTIONS) -> list[dict]:
    """The first records of each of these task files."""
    folder = data_folder("tasks")
    return [record for name, n in wanted.items() for record in load_records(folder / f"{name}.jsonl")[:n]]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict],
    systems: Sequence[str],
    settings: dict,
    each: Callable[[str, int], None] = lambda system, done: None,
) -> list[Result]:
    """Ask every system every question. `each(system, done)` is called after each answer.

    settings  fields of `Settings`; `full` keeps all its KV in memory, the others use the drive where one is named.
    """
    chosen = {name: options_of(name, settings) for name in systems}
    longest = max(len(tokenizer(record["context"]).input_ids) for record in records) + 128
    for name, own in chosen.items():
        plan(model.config, find_system(name, own)[1], longest, model.dtype)
    if longest > (window := model.config.max_position_embeddings):
        raise UsageError(
            f"a document of {longest} tokens exceeds the model's window of {window}; ask about shorter ones"
        )
    before = enable(model)
    try:
        return [_run(model, tokenizer, records, name, own, each) for name, own in chosen.items()]
    finally:
        disable(model, before)


def options_of(system: str, options: dict) -> dict:
    """`full` is the reference: all KV in memory, whatever the drive and budget of the others."""
    return options | {"drive": None, "host_budget": None} if system == "full" else options


def _run(model, tokenizer, records, name, options, each) -> Result:
    answers = []
    for done, record in enumerate(records, 1):
        with make_cache(model, name, **options) as cache:
            answers.append(ask(model, tokenizer, record, cache))
        each(name, done)
    return Result(name, answers, [is_right(r, a.text) for r, a in zip(records, answers, strict=True)], cache)


def floor(records: Sequence[dict]) -> float:
    """What a solver without a model gets that knows one half of the asked key."""
    return statistics.fmean(partial_key_floor(record) for record in records)
