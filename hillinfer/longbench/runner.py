"""Ask a model one question about one document, and measure the answer.

The document is prefilled in one exact pass. The question is then fed token by token, so that a system that drops
tokens has to find the answer with its own selection (a prefill that saw the question would leak the answer into the
first token).
"""

import re
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.evaluator.policy import Policy
from hillinfer.longbench.synthetic import MAX_NEW_TOKENS, PROMPTS
from hillinfer.pipeline.timeline import LANES

MARK = "\0"  # stands for the question while a template is split


@dataclass(frozen=True)
class Answer:
    """What came back, and what it took. Per-token figures are over all single-token steps: the question's and the
    answer's.
    """

    text: str
    prompt_tokens: int
    steps: int
    prefill_ms: float
    ms_per_token: float
    attended: float  # mean tokens attended to, per step and layer
    cached: float  # mean tokens that could have been
    rates: dict[str, float]  # tier -> share of the attended tokens
    drive_bytes_per_token: float
    lanes: dict[str, tuple[float, float]]  # lane -> busy ms and bytes, each per token
    overlap: float  # share of the shorter side, computing or moving, that was hidden behind the other
    memory: dict[str, int]  # bytes held at the end, by kind


def split_prompt(tokenizer: PreTrainedTokenizerBase, record: dict) -> tuple[list[int], list[int]]:
    """Token ids of a record's prompt up to the end of its context, and from there on."""
    head, _, tail = PROMPTS[record["dataset"]].partition("{context}")
    context = head.format(input=MARK) + record["context"]
    question = tail.format(input=record["input"])
    if MARK in context:
        raise ValueError(f"the template of {record['dataset']} puts the question before the context")
    return tokenizer(context).input_ids, tokenizer(question, add_special_tokens=False).input_ids


@torch.inference_mode()
def feed(model: PreTrainedModel, cache: TieredCache, ids: list[int], chunk: int | None = None) -> None:
    """Put further tokens into the cache: several are attended to exactly, a single one as the system selects.

    In chunks of `chunk` tokens, if given: what prefill holds beside the cache then stays small, but the cache is read
    anew for each chunk.
    """
    ends = list(range(chunk, len(ids) - 1, chunk)) if chunk else []  # never a chunk of one: it would be a decode step
    for start, end in pairwise([0, *ends, len(ids)]):
        part = torch.tensor([ids[start:end]], device=model.device)
        model(part, past_key_values=cache, logits_to_keep=1)


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: dict, cache: TieredCache, seen: bool = False
) -> Answer:
    """The greedy answer to a record's question. `model` must be enabled; `cache` must be empty.

    With `seen` the question is part of the prefill, all but its last token: what H2O and SnapKV were made for.
    """
    context, question = split_prompt(tokenizer, record)
    if seen:
        context, question = context + question[:-1], question[-1:]
    start = time.perf_counter()
    feed(model, cache, context)
    return _answer(model, tokenizer, record, cache, context, question, time.perf_counter() - start)


def ask_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict,
    ways: dict[str, tuple[type[Policy], Settings]],
) -> dict[str, Answer]:
    """The same question answered in several ways over one prefill, all KV in memory.

    Exact: a prefill does not depend on the policy, and the cache is cropped back to the document after each answer.
    """
    context, question = split_prompt(tokenizer, record)
    answers = {}
    # The codes are made at prefill, for the first way that needs them; one of another precision is refused.
    policy, settings = next((way for way in ways.values() if way[0].needs_codes), next(iter(ways.values())))
    with TieredCache(model.config, policy, settings) as cache:
        start = time.perf_counter()
        feed(model, cache, context)
        prefill_s = time.perf_counter() - start
        for name, (policy, settings) in ways.items():
            cache.use(policy, settings)
            answers[name] = _answer(model, tokenizer, record, cache, context, question, prefill_s)
            cache.crop(len(context) - cache.get_seq_length())
    return answers


def _answer(model, tokenizer, record, cache, context: list[int], question: list[int], prefill_s: float) -> Answer:
    cache.timeline.clear()  # the figures are of decode steps
    cache.counters.clear()
    start = time.perf_counter()
    for token in question[:-1]:
        feed(model, cache, [token])
    ids = torch.tensor([context + question], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=MAX_NEW_TOKENS[record["dataset"]],
        do_sample=False,
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return Answer(text, ids.shape[1], **measured(cache, prefill_s, time.perf_counter() - start))


def measured(cache: TieredCache, prefill_s: float, decode_s: float) -> dict:
    """The figures of an `Answer` from what the cache recorded."""
    rows = cache.counters.rows
    steps = len({row.step for row in rows}) or 1
    read = sum(span.bytes for span in cache.timeline.spans if span.kind in ("read", "prefetch", "abstract"))
    return {
        "steps": steps,
        "prefill_ms": prefill_s * 1e3,
        "ms_per_token": decode_s * 1e3 / steps,
        "attended": cache.counters.total("attended") / max(1, len(rows)),
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
    """Exact match of the first line; where the answer is a number, of its first number, as LongEval judges."""
    line = text.strip().split("\n")[0].strip()
    if all(answer.isdigit() for answer in record["answers"]):
        line = (re.findall(r"\d+", line) or [""])[0]
    return line in record["answers"]
