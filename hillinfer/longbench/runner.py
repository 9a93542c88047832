"""Ask a model one question about one document, and measure the answer.

The document is prefilled in one exact pass. The question is then fed token by token, so a selective system has to find
the answer with its own selection. (A prefill that includes the question would leak the answer into the first token.)
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from hillinfer import speculative
from hillinfer.cache import TieredCache, chunk_ends
from hillinfer.config import Settings
from hillinfer.evaluator.policy import Policy
from hillinfer.longbench.metrics import exact
from hillinfer.longbench.prefilled import Prefilled
from hillinfer.longbench.prompts import Prompt, build
from hillinfer.longbench.synthetic import MAX_NEW_TOKENS, PROMPTS
from hillinfer.longbench.tasks import BUNDLED, Task
from hillinfer.models.rows import as_batch
from hillinfer.timeline import LANES


@dataclass(frozen=True)
class Answer:
    """An answer with its measurements. Per-token figures average over the decode steps of question and answer."""

    text: str
    prompt_tokens: int
    new_tokens: int
    steps: int
    prefill_ms: float
    ms_per_token: float
    attended: float  # mean attended tokens per step, layer and sequence
    cached: float  # mean cached tokens per step and layer
    rates: dict[str, float]  # tier -> share of the attended tokens it served
    drive_bytes_per_token: float
    lanes: dict[str, tuple[float, float]]  # lane -> busy ms and bytes, each per token
    overlap: float  # share of the shorter side, compute or transfer, that ran concurrently with the other
    memory: dict[str, int]  # bytes in use at the end, by kind

    @property
    def memory_bytes(self) -> int:
        """KV bytes in memory at the end: records on device and host, key codes, hit table."""
        return in_memory(self.memory)


def in_memory(memory: dict[str, int]) -> int:
    """The sum of `TieredCache.memory()` without the drive's space."""
    return sum(size for kind, size in memory.items() if kind != "drive")


def synthetic_prompt(tokenizer: PreTrainedTokenizerBase, record: dict) -> tuple[Task, Prompt]:
    """Task and untruncated prompt of a synthetic record."""
    name = record["dataset"]
    task = Task(name, BUNDLED, PROMPTS[name], MAX_NEW_TOKENS[name], "exact", chat=False)
    return task, build(task, record, tokenizer, max_length=1 << 40, chat=False)


def split_prompt(tokenizer: PreTrainedTokenizerBase, record: dict) -> tuple[list[int], list[int]]:
    """Token ids of a synthetic record's prompt: the document, and the question after it."""
    prompt = synthetic_prompt(tokenizer, record)[1]
    return prompt.ids[: prompt.document], prompt.ids[prompt.document :]


# One greedy answer over the given cache, whatever the model's generation config asks for.
GREEDY = dict(num_beams=1, num_return_sequences=1, do_sample=False, return_dict_in_generate=False, use_cache=True)
GREEDY |= dict(guidance_scale=None, prompt_lookup_num_tokens=None, cache_implementation=None)


@torch.inference_mode()
def feed(model: PreTrainedModel, cache: Cache, ids: list[int], chunk: int | None = None, batch: int = 1) -> None:
    """Append tokens to the cache. Several tokens use exact attention; a single token is a decode step.

    chunk  bounds the tokens per forward pass: prefill then needs less memory, but each chunk re-reads the cache
    batch  rows of the cache, all fed alike
    """
    for start, end in pairwise(chunk_ends(len(ids), chunk)):
        part = torch.tensor([ids[start:end]] * batch, device=model.device)
        model(part, past_key_values=cache, logits_to_keep=1)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict,
    cache: TieredCache,
    seen: bool = False,
    exact: bool = False,
) -> Answer:
    """Greedy answer to a synthetic record, with an empty cache.

    With `seen`, the prefill includes all but the last token of the question: the setting of H2O and SnapKV.
    """
    task, prompt = synthetic_prompt(tokenizer, record)
    if seen:
        prompt = replace(prompt, document=len(prompt.ids) - 1)
    start = time.perf_counter()
    feed(model, cache, prompt.ids[: prompt.document])
    return answer(model, tokenizer, task, prompt, [cache], [time.perf_counter() - start], exact)[0]


def ask_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict,
    variants: dict[str, tuple[type[Policy], Settings]],
) -> dict[str, Answer]:
    """Answer one question with several policies over one shared prefill and in one decode, all KV in memory."""
    task, prompt = synthetic_prompt(tokenizer, record)
    start = time.perf_counter()
    source = prefill(model, prompt, policies=[policy for policy, _ in variants.values() if policy.watches])
    prefill_s = [time.perf_counter() - start] * len(variants)
    with ExitStack() as stack:
        caches = [
            stack.enter_context(TieredCache(model.config, policy, settings)) for policy, settings in variants.values()
        ]
        for cache in caches:
            source.fill(cache, model.device)
        return dict(zip(variants, answer(model, tokenizer, task, prompt, caches, prefill_s), strict=True))


def prefill(
    model: PreTrainedModel, prompt: Prompt, chunk: int | None = None, policies: Iterable[type[Policy]] = ()
) -> Prefilled:
    """Prefill the document once, to be copied into the cache of each variant; `policies` observe the pass.

    The result is exact: prefill does not depend on the selection of decode steps.
    """
    source = Prefilled(model.config, policies)
    feed(model, source, prompt.ids[: prompt.document], chunk)
    return source.to("cpu")


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompt: Prompt,
    caches: Sequence[TieredCache],
    prefill_s: Sequence[float],
    exact: bool = False,
) -> list[Answer]:
    """Feed the question to caches that contain the document, and decode greedily, all as rows of one batch.

    Times are a system's own with one cache only. `prefill_s`, one for each cache, are only reported.

    exact  verify what the system drafts, of one cache; the question is then read in one pass over all KV
    """
    for cache in caches:
        cache.timeline.clear()  # the figures cover decode steps only
        cache.counters.clear()
    start, rules = time.perf_counter(), stop_rules(task, tokenizer, len(prompt.ids))
    with as_batch(caches) as rows:
        if exact:
            rules["custom_generate"] = speculative.exact
        for token in () if exact else prompt.ids[prompt.document : -1]:
            feed(model, rows, [token], batch=len(caches))
        out = decode_rows(model, rows, prompt.ids, len(caches), task.max_new_tokens, **rules)
    took, texts = time.perf_counter() - start, [tokenizer.decode(ids, skip_special_tokens=True) for ids in out]
    return [
        Answer(text, len(prompt.ids), len(ids), **measured(cache, before, took))
        for text, ids, cache, before in zip(texts, out, caches, prefill_s, strict=True)
    ]


class RowEnds(StoppingCriteria):
    """Marks rows that have come to their end, so that their caches take no further part."""

    def __init__(self, ended: torch.Tensor, ends: Iterable[int]):
        self.ended, self.ends = ended, torch.tensor([*ends], dtype=torch.long, device="cpu")

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.ended |= torch.isin(input_ids[:, -1].cpu(), self.ends)
        return self.ended.to(input_ids.device)


def decode(model: PreTrainedModel, cache: TieredCache, ids: list[int], max_new_tokens: int, **rules) -> torch.Tensor:
    """Token ids of the greedy continuation of `ids`, of which the cache holds a prefix. `rules` are `generate`'s."""
    return decode_rows(model, cache, ids, 1, max_new_tokens, **rules)[0]


def decode_rows(
    model: PreTrainedModel, cache: Cache, ids: list[int], batch: int, max_new_tokens: int, **rules
) -> list[torch.Tensor]:
    """`decode` of `batch` rows with the same prompt, each up to its own end."""
    prompt = torch.tensor([ids] * batch, device=model.device)
    settings = GREEDY | {"max_new_tokens": max_new_tokens} | rules
    ends = ends_of(model, **rules)
    if batch > 1:
        settings["stopping_criteria"] = StoppingCriteriaList([RowEnds(cache.ended, ends)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **settings)
    return [_to_end(row, ends) for row in out[:, len(ids) :]]


def ends_of(model: PreTrainedModel, **rules) -> list[int]:
    """Token ids that end an answer under these rules of `generate`."""
    ends = rules.get("eos_token_id", model.generation_config.eos_token_id)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _to_end(ids: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Token ids up to the first end, which is kept."""
    stops = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device)).nonzero()
    return ids[: int(stops[0]) + 1] if len(stops) else ids


def stop_rules(task: Task, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> dict:
    """Arguments of `generate` for a task's stop text, as in pred.py for samsum: stop at it, but not as first token."""
    if task.stop is None:
        return {}
    ends = [tokenizer.eos_token_id, tokenizer.encode(task.stop, add_special_tokens=False)[-1]]
    return {"min_length": prompt_tokens + 1, "eos_token_id": [end for end in ends if end is not None]}


def measured(cache: TieredCache, prefill_s: float, decode_s: float) -> dict:
    """The measurements of an `Answer`, from the cache's timeline and counters."""
    rows, batch = cache.counters.rows, cache.run.geometry.batch if cache.run.geometry else 1
    drafts = sum(drafted - accepted - 1 for drafted, accepted in cache.counters.rounds)  # that became no token
    steps = len({row.step for row in rows}) - drafts or 1
    read = sum(span.bytes for span in cache.timeline.spans if span.kind in ("read", "prefetch", "abstract"))
    return {
        "steps": steps,
        "prefill_ms": prefill_s * 1e3,
        "ms_per_token": decode_s * 1e3 / steps,
        "attended": cache.counters.total("attended") / max(1, len(rows)) / batch,
        "cached": cache.counters.total("cached") / max(1, len(rows)),
        "rates": cache.counters.rates(),
        "drive_bytes_per_token": read / steps,
        "lanes": {
            lane: (
                cache.timeline.busy_ms(lane) / steps,
                sum(span.bytes for span in cache.timeline.spans if span.lane == lane) / steps,
            )
            for lane in LANES
        },
        "overlap": cache.timeline.overlap(),
        "memory": cache.memory(),
    }


def is_right(record: dict, text: str) -> bool:
    """True if `text` answers a synthetic record correctly."""
    return any(exact(text, wanted) for wanted in record["answers"])
