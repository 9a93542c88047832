"""One sample of one task, answered by every system at every alpha: over one prefill, and in one decode."""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from hillinfer.cache import TieredCache
from hillinfer.longbench.fidelity import force, reference_ids
from hillinfer.longbench.metrics import score
from hillinfer.longbench.models import load_model
from hillinfer.longbench.prefilled import Prefilled
from hillinfer.longbench.prompts import Prompt, build, official_max_length
from hillinfer.longbench.runner import answer, feed
from hillinfer.longbench.tasks import Task
from hillinfer.models.support import check_supported
from hillinfer.pipeline.memory import read_memory
from hillinfer.systems.registry import list_systems, make_cache
from hillinfer.systems.shapes import shape_of, window_of

QUESTIONS = ("stepwise", "prefilled")
MEASURED = "pred score new_tokens attended cached rates prefill_ms paid_ms fill_ms ms_per_token drive_bytes_per_token"
MEASURED = (*MEASURED.split(), "kv_bytes_per_token", "memory_bytes")  # fields of a row, None without an answer
SEED = 42


@dataclass(frozen=True)
class Variant:
    """A system at one alpha; `alpha` is None for full attention."""

    system: str
    alpha: float | None
    question: str = "stepwise"  # or prefilled, with the document

    def __str__(self) -> str:
        return self.system if self.alpha is None else f"{self.system} {self.alpha:g}"


FULL = Variant("full", None)


@dataclass(frozen=True)
class EvalSettings:
    """Everything that affects an answer besides model, sample and variant."""

    max_length: int | None = None  # tokens; None applies LongBench's rule for the context window
    chat: bool | None = None  # None: if the tokenizer has a chat template
    dtype: str = "auto"
    prefill_chunk: int | None = None
    threads: int = 1
    seed: int = SEED
    answers: bool = True  # False: fidelity alone
    fidelity: tuple[str, ...] = ()  # answers to teacher-force: reference, own (of `full`)
    options: tuple[tuple[str, object], ...] = ()  # further fields of `Settings`
    times: bool = False  # one variant at a time, so that its time is its own
    share_prefill: bool = True
    store: str | None = None  # folder of prompts' KV, which opens and keeps the document of a shared prefill
    exact: bool = False  # systems that select draft, and all KV verifies

    def identity(self) -> dict:
        """The settings that all runs of one folder must share, as JSON. A shared prefill changes no answer,
        nor does a store, but for rounding."""
        values = asdict(self) | {"options": dict(self.options), "fidelity": list(self.fidelity)}
        values["exact"] = self.exact or None  # folders of before have none
        del values["share_prefill"], values["store"]
        return values


@dataclass(frozen=True)
class Job:
    """One sample and its variants, to be answered by one worker."""

    model: str  # its name in the results
    path: str  # local folder or Hub name
    task: Task
    record: dict
    variants: tuple[Variant, ...]
    settings: EvalSettings
    drive: str | None = None  # folder on the worker's machine; None uses its temporary folder


def run_job(job: Job) -> list[dict]:
    """Answer one sample: one row per variant. Their `seconds` add up to the job's run time."""
    return [row for rows in answer_groups(job) for row in rows]


def answer_groups(job: Job) -> Iterator[list[dict]]:
    """The rows of `run_job` as they come: of the variants that decode together, group by group."""
    wanted = job.settings
    model, tokenizer = load_model(job.path, wanted.dtype, wanted.threads, wanted.seed)
    prompt = prompt_of(job.task, job.record, model.config, tokenizer, wanted.max_length, wanted.chat)
    asker = Asker(model, tokenizer, job)
    for question in QUESTIONS:  # in this order: the document's prefill is taken on
        asked = prompt if question == "stepwise" else replace(prompt, document=len(prompt.ids) - 1)
        if variants := [variant for variant in job.variants if variant.question == question]:
            for group in asker.groups(variants, asked):
                began = time.perf_counter()
                with torch.inference_mode():  # not around a yield: it would reach the caller
                    answered = asker.answer(group, asked)
                seconds = (time.perf_counter() - began) / len(group)
                yield [row | {"seconds": seconds} for row in answered]


class Asker:
    """Asks a sample's question over one exact prefill, which is copied into the cache of each variant."""

    def __init__(self, model, tokenizer, job: Job):
        self.model, self.tokenizer, self.job, systems = model, tokenizer, job, list_systems()
        self.policies = {variant: systems[variant.system].policy for variant in (*job.variants, FULL)}
        able = [v for v in job.variants if (policy := self.policies[v]).watches or policy.late]
        self.sharing = {*able, FULL} if job.settings.share_prefill and (len(able) > 1 or job.settings.fidelity) else ()
        watchers = [policy for variant, policy in self.policies.items() if variant in self.sharing and policy.watches]
        apart = dict(job.settings.options).get("per_head", True)
        self.source, self.seconds = Prefilled(model.config, watchers, apart), 0.0

    def groups(self, variants: list[Variant], prompt: Prompt) -> list[list[Variant]]:
        """Variants that decode together: as many as half of the free memory holds, one if times are to be measured."""
        config, size = self.model.config, 1
        if not (self.job.settings.times or self.job.settings.exact or check_supported(config).exact):
            shape = shape_of(config.get_text_config(decoder=True), self.model.dtype.itemsize)
            tokens = len(prompt.ids) + self.job.task.max_new_tokens
            size = max(1, int(free_memory() / 2 / (1.5 * shape.layers * shape.record_bytes * tokens)))
        return [variants[start : start + size] for start in range(0, len(variants), size)]

    @contextmanager
    def opened(self, variants: Sequence[Variant], prompt: Prompt):
        """Caches that hold the prefilled part, and for each the seconds: of prefill, paid for it here, of the copy."""
        with ExitStack() as stack:
            caches, seconds = [], []
            for variant in variants:
                caches.append(stack.enter_context(cache_for(self.model, self.job, variant)))
                seconds.append(self.fill(caches[-1], variant, prompt.ids[: prompt.document]))
            yield caches, seconds

    def fill(self, cache: TieredCache, variant: Variant, ids: list[int]) -> tuple[float, float, float]:
        chunk = self.job.settings.prefill_chunk
        if variant not in self.sharing:
            took = timed(feed, self.model, cache, ids, chunk)
            return took, took, 0.0
        paid, before, policy = 0.0, self.source.get_seq_length(), self.policies[variant]
        if before < len(ids):
            paid = timed(self.prefill, ids[before:])
            self.seconds += paid
        plain = self.seconds - sum(self.source.seconds.values())
        copied = timed(self.source.fill, cache, self.model.device, chunk)
        return plain + self.source.seconds.get(policy, 0.0), paid, copied

    def answer(self, group: list[Variant], prompt: Prompt) -> list[dict]:
        """A row of results for each variant."""
        job = self.job
        common = dict(model=job.model, task=job.task.name, id=job.record["_id"], suite=job.task.suite)
        common |= {name: job.record[name] for name in ("answers", "all_classes", "length")}
        common |= dict(
            buckets=job.task.buckets(job.record),
            original_tokens=prompt.original,
            truncated=prompt.truncated,
            cut_again=prompt.recut,
            prompt_tokens=len(prompt.ids),
            question_tokens=len(prompt.ids) - prompt.document,
        )
        measured = self.answers(group, prompt) if job.settings.answers else [dict.fromkeys(MEASURED)] * len(group)
        rows = [
            common | asdict(variant) | {"shared": variant in self.sharing, "fidelity": {}} | own
            for variant, own in zip(group, measured, strict=True)
        ]
        for kind in job.settings.fidelity:
            for row, found in zip(rows, self.fidelity(kind, group, prompt), strict=True):
                row["fidelity"][kind] = found
        return rows

    def answers(self, group: list[Variant], prompt: Prompt) -> list[dict]:
        """Answer, score and cost of each variant."""
        record, task = self.job.record, self.job.task
        found = []
        with self.opened(group, prompt) as (caches, seconds):
            exact = self.job.settings.exact and not self.policies[group[0]].exact
            paid_s = [prefill for prefill, _, _ in seconds]
            answers = answer(self.model, self.tokenizer, task, prompt, caches, paid_s, exact)
            for cache, each, (_, paid, copied) in zip(caches, answers, seconds, strict=True):
                found.append({
                    "pred": each.text, "score": score(task, each.text, record["answers"], record["all_classes"]),
                    "new_tokens": each.new_tokens,
                    "attended": each.attended, "cached": each.cached, "rates": each.rates,
                    "prefill_ms": each.prefill_ms, "paid_ms": paid * 1e3, "fill_ms": copied * 1e3,
                    "ms_per_token": each.ms_per_token if len(group) == 1 else None,
                    "drive_bytes_per_token": each.drive_bytes_per_token,
                    "kv_bytes_per_token": each.attended * cache.run.token_bytes,
                    "memory_bytes": each.memory_bytes,
                })  # fmt: skip
        return found

    def fidelity(self, kind: str, group: list[Variant], prompt: Prompt) -> list[dict]:
        """How closely each variant follows `full`, on the reference answer or on `full`'s own."""
        gold = reference_ids(self.tokenizer, self.job.task, prompt, self.job.record["answers"])
        with self.opened((FULL, *group), prompt) as (caches, _):
            found = force(self.model, caches, prompt.ids[prompt.document :], gold if kind == "reference" else None)
        return [asdict(each) for each in found[1:]]

    def prefill(self, ids: list[int]) -> None:
        """Take these tokens into the shared prefill; its first ones from the store as far as they are there."""
        chunk, store = self.job.settings.prefill_chunk, self.job.settings.store
        if store is not None and not self.source.seconds and not self.source.get_seq_length():
            with make_cache(self.model, "full", store) as cache:
                cache.run.keeper.open(ids)
                feed(self.model, cache, ids[cache.get_seq_length() :], chunk)
                for layer, own in zip(self.source.layers, cache.tiered, strict=True):
                    layer.update(*(part.clone() for part in own.everything()))
            return
        self.source.to(self.model.device)
        feed(self.model, self.source, ids, chunk)
        self.source.to("cpu")


def timed(function, *arguments) -> float:
    """The call's duration in seconds."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def free_memory() -> float:
    """Bytes that the process may still use; unlimited where the system does not say."""
    try:
        return read_memory().budget()
    except (OSError, KeyError):
        return math.inf


def cache_for(model, job: Job, variant: Variant):
    """The cache of one variant. Only systems that need a drive get one."""
    options = dict(job.settings.options) | ({} if variant.alpha is None else {"alpha": variant.alpha})
    if list_systems()[variant.system].needs_drive:
        options["drive"] = job.drive or tempfile.gettempdir()
    else:
        options = {name: value for name, value in options.items() if name in ("alpha", "precision", "per_head")}
    return make_cache(model, variant.system, **options)


def prompt_of(
    task: Task, record: dict, config, tokenizer, max_length: int | None = None, chat: bool | None = None
) -> Prompt:
    """A record's prompt, truncated to the limits of task and model; `max_length` and `chat` as in `EvalSettings`."""
    window, limit = window_of(config), max_length
    if limit is None and task.truncates and window:
        limit = official_max_length(window)
    room = window - task.max_new_tokens if window else None
    limits = [n for n in (limit, room) if n is not None]
    chat = bool(tokenizer.chat_template) if chat is None else chat
    return build(task, record, tokenizer, min(limits, default=1 << 40), chat, room=room)
