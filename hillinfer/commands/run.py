"""Continue a text with any supported model: `hillinfer run`."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hillinfer.assets import data_folder
from hillinfer.cache import TieredCache
from hillinfer.errors import UsageError
from hillinfer.longbench.runner import feed, measured
from hillinfer.seam import check_supported
from hillinfer.session import check_session, keep_session, session_ids
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system, make_cache
from hillinfer.systems.shapes import shape_of
from hillinfer.timeline import Timeline
from hillinfer.whatif.recording import describe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Continuation:
    text: str
    facts: list[str]
    timeline: Timeline


@dataclass(frozen=True)
class Job:
    """What to continue: a text, or a document and a question, whose KV a session may keep.

    session  file of the document's KV: opened if it exists, else made from `document`
    """

    text: str
    document: str | None = None
    session: Path | None = None
    max_new_tokens: int = 64
    num_beams: int = 1
    dtype: str = "auto"
    chunk: int | None = None  # tokens prefilled at once


def run(name: str, job: Job, system: str, options: dict) -> Continuation:
    """Greedy continuation. Everything that can be refused is refused before the weights are loaded."""
    dtype, max_new_tokens = job.dtype, job.max_new_tokens
    kept = job.session is not None and job.session.exists()
    if job.session is not None and not kept:
        if job.document is None:
            raise UsageError(f"there is no session {job.session} yet: name the text to keep in it (--document FILE)")
        check_session(job.session)
    settings = find_system(system, options)[1]
    path = data_folder("model") if name == "embedded" else name
    config = _load(AutoConfig, path, name)
    check_supported(config)
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"no dtype '{dtype}'; choose auto, {', '.join(DTYPES)}")
    width = DTYPES.get(dtype) or config.dtype or torch.float32
    tokenizer = _load(AutoTokenizer, path, name)
    document = tokenizer(job.document).input_ids if job.document is not None else []
    if kept:
        document = session_ids(job.session, document)
    ids = document + tokenizer(job.text, add_special_tokens=not document).input_ids
    total, window = len(ids) + max_new_tokens, getattr(config, "max_position_embeddings", None)
    if window and total > window:
        raise UsageError(
            f"the prompt's {len(ids)} tokens and {max_new_tokens} new ones exceed the model's window of {window}: "
            "shorten the prompt or lower --max-new-tokens"
        )
    plan(config, settings, total, width, job.chunk)
    if settings.stream is not None:
        options = options | {"max_tokens": total}
    model = _load(AutoModelForCausalLM, path, name, dtype=width).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    start = time.perf_counter()
    with _filled_cache(model, tokenizer, job, system, options, document) as cache:
        if (rest := ids[cache.get_seq_length() : -1]) and job.num_beams == 1:
            feed(model, cache, rest, job.chunk)  # the last prompt token is a decode step like those after it
        prefilled = time.perf_counter()
        cache.timeline.clear()
        cache.counters.clear()
        prompt = torch.tensor([ids], device=model.device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            num_beams=job.num_beams,
            do_sample=False,
        )
        figures = measured(cache, prefilled - start, time.perf_counter() - prefilled)
        why = cache.run.why_split()
        shape = shape_of(model.config.get_text_config(), model.dtype.itemsize)
        cache.timeline.about = describe(cache.run, shape, system)
    answer = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return Continuation(answer, [*tell(system, figures, cache), why], cache.timeline)


def _filled_cache(model, tokenizer, job: Job, system: str, options: dict, document: list[int]) -> TieredCache:
    """A cache that holds the document, from its session or by prefill."""
    if job.session is not None:
        return keep_session(job.session, model, document, system, tokenizer, job.chunk, **options)
    cache = make_cache(model, system, **options)
    try:
        if document:
            feed(model, cache, document, job.chunk)
    except BaseException:
        cache.close()
        raise
    return cache


def tell(system: str, figures: dict, cache: TieredCache) -> list[str]:
    """What a run took, in a few lines. All measured."""
    rates = ", ".join(f"{tier} {share:.0%}" for tier, share in figures["rates"].items())
    held = sum(size for kind, size in figures["memory"].items() if kind != "drive")
    busy = {lane: (ms, size) for lane, (ms, size) in figures["lanes"].items() if ms}
    lines = [
        f"{system}, measured: prefill {figures['prefill_ms']:.0f} ms, then {figures['ms_per_token']:.1f} ms/token "
        f"over {figures['steps']} steps; {held:,} bytes of KV, codes and counters in memory at the end",
        f"attended {figures['attended']:.0f} of {figures['cached']:.0f} tokens, served by {rates}; "
        f"{figures['drive_bytes_per_token']:,.0f} bytes/token from the drive",
        "bounds, ms/token if a lane were alone: "
        + ", ".join(f"{lane} {ms:.2f} ({size:,.0f} bytes)" for lane, (ms, size) in busy.items())
        + f"; {figures['overlap']:.0%} of the shorter side hidden",
    ]
    if cache.counters.total("guessed"):
        accuracy, cover = cache.counters.prefetch()
        lines.append(
            f"prefetch: {accuracy:.0%} of what was brought ahead was used, {cover:.0%} of what was needed came so"
        )
    return lines


def _load(loader, path, name: str, **options):
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)  # a model is data, not code
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"cannot load model '{name}' ({reason}); give a folder with config.json, or a hub id in reach"
        ) from None
