"""Continue a text with any supported model: the work of `hillinfer run`."""

import time
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from hillinfer.cache import TieredCache
from hillinfer.commands.console import working
from hillinfer.commands.options import DTYPES
from hillinfer.errors import UsageError
from hillinfer.loading import choose_dtype, load_pretrained, load_weights
from hillinfer.longbench.prompts import turn
from hillinfer.longbench.runner import decode, feed, in_memory, measured
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.keeper import check_stored
from hillinfer.session import check_keeps, keep_session, session_ids
from hillinfer.speculative import check_draft, describe_rounds
from hillinfer.speculative import exact as exact_decoding
from hillinfer.systems.planning import plan
from hillinfer.systems.registry import find_system, make_cache
from hillinfer.systems.shapes import shape_of
from hillinfer.timeline import Timeline
from hillinfer.whatif.recording import describe


def continue_text(
    name: str,
    text: str,
    system: str,
    options: dict,
    *,
    document: str | None = None,
    chat: bool = False,
    session: Path | None = None,
    store: Path | None = None,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    dtype: str = "auto",
    chunk: int | None = None,
    exact: bool = False,
) -> tuple[str, list[str], Timeline]:
    """Greedy continuation by the model `name`: the generated text, the cost of the run in a few lines, its timeline.

    text      to continue, or a question on the `document`, in the model's chat format if `chat`
    options   fields of `Settings`
    session   file of the document's KV: opened if it exists, otherwise written from `document`
    store     folder of prompts' KV: a known prefix is opened, and what is computed is kept
    chunk     tokens per prefill chunk; None prefills all at once
    exact     verify what the system's selection drafts

    Raises UsageError before the weights are loaded if the model's config or tokenizer rules the run out.
    """
    found, settings = find_system(system, options)
    if exact:
        check_draft(found.policy)
    if dtype not in DTYPES:
        raise UsageError(f"no dtype '{dtype}'; choose {', '.join(DTYPES)}")
    with working(f"loading the tokenizer of {name}"):
        config = load_pretrained(AutoConfig, name)
        tokenizer = load_pretrained(AutoTokenizer, name)
    weights = choose_dtype(name, config, dtype)
    before = tokenizer(document).input_ids if document is not None else []
    if chat:
        before, asked = turn(tokenizer, document, text)
    if session is not None:
        check_keeps(config, system, options)
        before = session_ids(session, before)
    if store is not None:
        check_stored(config)
        store = PrefixStore(store)
    ids = before + (asked if chat else tokenizer(text, add_special_tokens=not before).input_ids)
    total = len(ids) + max_new_tokens
    plan(config, settings, total, weights, chunk, found.policy)
    options = options | ({} if settings.stream is None else {"max_tokens": total})
    with working(f"loading {name}") as tell:
        model = load_weights(name, config, weights, lambda what, _: tell(f"loading {name}: {what}"))
    start = time.perf_counter()
    if session is None:
        cache = make_cache(model, system, store, **options)
    else:
        cache = keep_session(session, model, before, system, tokenizer, chunk, **options)
    with cache:
        with working(f"prefill, {len(ids):,} tokens"):
            if store is not None:
                cache.run.keeper.open(ids[: len(before) or len(ids) - 1])  # at once, and not chunk by chunk
                opened = str(cache.run.keeper.report)
            for end in (len(before), len(ids) - 1):  # the last prompt token is a decode step like those after it
                part = ids[cache.get_seq_length() : end]
                if len(part) > exact and num_beams == 1:  # exact: a single token would be a step of the selection
                    feed(model, cache, part, chunk)
        prefilled = time.perf_counter()
        cache.timeline.clear()
        cache.counters.clear()
        with working(f"decode, up to {max_new_tokens} tokens"):
            way = {"custom_generate": exact_decoding} if exact else {"num_beams": num_beams}
            out = decode(model, cache, ids, max_new_tokens, **way)
        figures = measured(cache, prefilled - start, time.perf_counter() - prefilled)
        facts = [*describe_cost(system, figures, cache), cache.why_split()]
        if drafts := describe_rounds(cache.counters.rounds):
            facts.append(f"exact: {len(out)} tokens, {drafts}")
        if store is not None:
            facts.append(f"{opened}; {cache.run.keeper.settle()} blocks were kept")
        facts.append(f"weights in {str(model.dtype).removeprefix('torch.')} on {model.device.type}")
        cache.timeline.about = describe(cache.run, shape_of(model.config.get_text_config(), weights.itemsize), system)
    return tokenizer.decode(out, skip_special_tokens=True), facts, cache.timeline


def describe_cost(system: str, figures: dict, cache: TieredCache) -> list[str]:
    """Measured time, memory and traffic of a run, in a few lines."""
    rates = ", ".join(f"{tier} {share:.0%}" for tier, share in figures["rates"].items())
    busy = [f"{lane} {ms:.2f} ({size:,.0f} bytes)" for lane, (ms, size) in figures["lanes"].items() if ms]
    lines = [
        f"{system}, measured: prefill {figures['prefill_ms']:.0f} ms, then {figures['ms_per_token']:.1f} ms/token "
        f"over {figures['steps']} steps; {in_memory(figures['memory']):,} bytes of KV, codes and counters in memory",
        f"attended {figures['attended']:.0f} of {figures['cached']:.0f} tokens, served by {rates}; "
        f"{figures['drive_bytes_per_token']:,.0f} bytes/token from the drive",
        f"lower bounds, ms/token by lane: {', '.join(busy)}; overlap {figures['overlap']:.0%} of the shorter side",
    ]
    if cache.counters.total("guessed"):
        shares = "prefetch accuracy {:.0%} (used / prefetched), coverage {:.0%} (prefetched / needed)"
        lines.append(shares.format(*cache.counters.prefetch()))
    return lines
