"""Continue a text with any supported model: the work of `hillinfer run`."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hillinfer.assets import load_pretrained
from hillinfer.cache import TieredCache
from hillinfer.commands.options import DTYPES
from hillinfer.errors import UsageError
from hillinfer.longbench.runner import decode, feed, measured
from hillinfer.seam import check_supported
from hillinfer.session import keep_session, session_ids
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system, make_cache
from hillinfer.systems.shapes import shape_of
from hillinfer.timeline import Timeline
from hillinfer.whatif.recording import describe


@dataclass(frozen=True)
class Continuation:
    """The generated text, the cost of the run in a few lines, and its timeline."""

    text: str
    facts: list[str]
    timeline: Timeline


@dataclass(frozen=True)
class Job:
    """A text to continue, or a document and a question.

    session  file of the document's KV: opened if it exists, otherwise written from `document`
    chunk    tokens per prefill chunk; None prefills all at once
    """

    text: str
    document: str | None = None
    session: Path | None = None
    max_new_tokens: int = 64
    num_beams: int = 1
    dtype: str = "auto"
    chunk: int | None = None


def continue_text(name: str, job: Job, system: str, options: dict) -> Continuation:
    """Greedy continuation by the model `name`. `options` are fields of `Settings`.

    Raises UsageError before the weights are loaded if the model's config or tokenizer rules the run out.
    """
    settings = find_system(system, options)[1]
    config = load_pretrained(AutoConfig, name)
    check_supported(config)
    if job.dtype not in DTYPES:
        raise UsageError(f"no dtype '{job.dtype}'; choose {', '.join(DTYPES)}")
    dtype = getattr(torch, job.dtype) if job.dtype != "auto" else config.dtype or torch.float32
    tokenizer = load_pretrained(AutoTokenizer, name)
    document = tokenizer(job.document).input_ids if job.document is not None else []
    if job.session is not None:
        document = session_ids(job.session, document)
    ids = document + tokenizer(job.text, add_special_tokens=not document).input_ids
    total = len(ids) + job.max_new_tokens
    plan(config, settings, total, dtype, job.chunk)
    if settings.stream is not None:
        options = options | {"max_tokens": total}
    model = load_pretrained(AutoModelForCausalLM, name, dtype=dtype).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    start = time.perf_counter()
    if job.session is None:
        cache = make_cache(model, system, **options)
    else:
        cache = keep_session(job.session, model, document, system, tokenizer, job.chunk, **options)
    with cache:
        for end in (len(document), len(ids) - 1):  # the last prompt token is a decode step like those after it
            if (part := ids[cache.get_seq_length() : end]) and job.num_beams == 1:
                feed(model, cache, part, job.chunk)
        prefilled = time.perf_counter()
        cache.timeline.clear()
        cache.counters.clear()
        out = decode(model, cache, ids, job.max_new_tokens, num_beams=job.num_beams)
        figures = measured(cache, prefilled - start, time.perf_counter() - prefilled)
        facts = [*describe_cost(system, figures, cache), cache.run.why_split()]
        cache.timeline.about = describe(cache.run, shape_of(model.config.get_text_config(), dtype.itemsize), system)
    return Continuation(tokenizer.decode(out, skip_special_tokens=True), facts, cache.timeline)


def describe_cost(system: str, figures: dict, cache: TieredCache) -> list[str]:
    """Measured time, memory and traffic of a run, in a few lines."""
    rates = ", ".join(f"{tier} {share:.0%}" for tier, share in figures["rates"].items())
    in_memory = sum(size for part, size in figures["memory"].items() if part != "drive")
    busy = [f"{lane} {ms:.2f} ({size:,.0f} bytes)" for lane, (ms, size) in figures["lanes"].items() if ms]
    lines = [
        f"{system}, measured: prefill {figures['prefill_ms']:.0f} ms, then {figures['ms_per_token']:.1f} ms/token "
        f"over {figures['steps']} steps; {in_memory:,} bytes of KV, codes and counters in memory at the end",
        f"attended {figures['attended']:.0f} of {figures['cached']:.0f} tokens, served by {rates}; "
        f"{figures['drive_bytes_per_token']:,.0f} bytes/token from the drive",
        f"lower bounds, ms/token by lane: {', '.join(busy)}; overlap {figures['overlap']:.0%} of the shorter side",
    ]
    if cache.counters.total("guessed"):
        accuracy, coverage = cache.counters.prefetch()
        lines.append(
            f"prefetch accuracy {accuracy:.0%} (used / prefetched), coverage {coverage:.0%} (prefetched / needed)"
        )
    return lines
