"""Sessions: a document's KV saved to a file after prefill, reopened by any process under any system.

Opening replays the records into the layers in the chunks of the prefill, so codes, pools, windows and answers equal
the prefill's. The file is read-only; every opened cache is private.
"""

import operator
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hillinfer import files
from hillinfer.cache import TieredCache, chunk_ends
from hillinfer.errors import UsageError
from hillinfer.fingerprint import fingerprint, tokens_fingerprint
from hillinfer.models.support import check_supported
from hillinfer.prefix_store.filling import check_whole, fill
from hillinfer.session_file import Saved, check_session, save
from hillinfer.systems.registry import find_system, make_cache, unwrap

Tokenizer = PreTrainedTokenizerBase


def save_session(
    cache: TieredCache, path: str | Path, model: PreTrainedModel, ids: Sequence[int], tokenizer: Tokenizer | None = None
) -> Path:
    """Atomically save the KV of the tokens `ids`, the single sequence that the cache holds.

    tokenizer  its fingerprint is saved; opening with another tokenizer is refused

    Raises UsageError if the cache cannot be saved or `path` is a file but not a session, and OSError if writing fails.
    Either leaves an earlier session unchanged.
    """
    check_whole(cache.support)
    layers, geometry, ids = cache.tiered, cache.run.geometry, _flat(ids)
    if not layers or geometry is None or cache.run.batch != 1:
        raise UsageError("a session is one sequence: prefill one document, without padding, and save it")
    if len(ids) != cache.get_seq_length():
        raise UsageError(f"{len(ids)} token ids for {cache.get_seq_length()} cached tokens: pass the document's")
    facts = {"model": fingerprint(unwrap(model)), "ids": ids, "pieces": layers[0].pieces}
    if tokenizer is not None:
        facts["tokenizer"] = tokens_fingerprint(tokenizer)
    shape = (len(layers), 1, len(ids), 2, cache.run.heads * geometry.kv_heads, geometry.head_dim)
    try:
        save(Path(path), (layer.records() for layer in layers), shape, geometry.dtype, facts)
    except OSError as error:
        raise OSError(f"the session {path} was not saved: {error}") from error
    return Path(path)


def open_session(
    path: str | Path, model: PreTrainedModel, system: str = "hillinfer", tokenizer: Tokenizer | None = None, **options
) -> tuple[TieredCache, list[int]]:
    """A cache with a saved document's KV, and the document's token ids, for `generate(ids + question, ...)`.

    options  fields of `Settings`

    Raises UsageError if the file is not a session, belongs to another model or tokenizer, or is damaged.
    """
    model = unwrap(model)
    check_keeps(model.config, system, options)
    with closing(Saved(Path(path))) as file:
        files.reclaim(file.path.parent.resolve(), f".{file.path.name}-")
        ids, pieces = _checked(file, model, tokenizer)
        with ExitStack() as failing:
            cache = failing.enter_context(make_cache(model, system, **options))
            fill(cache, file.read, pieces, model.device)
            failing.pop_all()
    cache.timeline.clear()
    cache.counters.clear()
    return cache, ids


@torch.no_grad()
def keep_session(
    path: str | Path,
    model: PreTrainedModel,
    document: Sequence[int],
    system: str = "hillinfer",
    tokenizer: Tokenizer | None = None,
    chunk: int | None = None,
    **options,
) -> TieredCache:
    """A cache with the document's KV: opened from `path` if it exists, otherwise prefilled (in chunks) and saved there.

    Raises UsageError as `save_session` and `open_session` do, and if the session is of another document.
    """
    model, path = unwrap(model), Path(path).expanduser()
    check_keeps(model.config, system, options)
    document = session_ids(path, _flat(document))
    if path.exists():
        return open_session(path, model, system, tokenizer, **options)[0]
    if max(document) >= (known := model.config.get_text_config(decoder=True).vocab_size):
        raise UsageError(f"the document has token {max(document)}, but the model knows {known}: use its own tokenizer")
    fingerprint(model)  # refuses what could not be saved, before the work
    with ExitStack() as failing:
        cache = failing.enter_context(make_cache(model, system, **options))
        for start, end in pairwise(chunk_ends(len(document), chunk)):
            part = torch.tensor([document[start:end]], device=model.device)
            model(part, past_key_values=cache, logits_to_keep=1)
        save_session(cache, path, model, document, tokenizer)
        failing.pop_all()
    return cache


def check_keeps(config: PretrainedConfig, system: str, options: dict) -> None:
    """UsageError if the system cannot continue from a session, or if the model has layers that none can hold."""
    if not find_system(system, options)[0].policy.late:
        raise UsageError(
            f"{system} selects by the prompt's queries, which sessions do not keep: prefill again, without a session"
        )
    check_whole(check_supported(config))


def _flat(ids: Sequence[int]) -> list[int]:
    """Token ids as a list. UsageError for anything else, such as text or a batch."""
    try:
        flat = [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        flat = [-1]
    if min(flat, default=0) < 0:
        raise UsageError("a document is a flat sequence of token ids, such as tokenizer(text).input_ids")
    return flat


def session_ids(path: str | Path, document: list[int]) -> list[int]:
    """Token ids of a session's document, read from the file without its KV; `document` if the file does not exist.

    Raises UsageError if `document` is given and differs, if both are missing, or if `path` cannot hold a session.
    """
    if Path(path).expanduser().exists():
        with closing(Saved(Path(path))) as file:
            ids = file.facts.get("ids")
        if not isinstance(ids, list) or (document and document != ids):
            raise UsageError(f"{path} keeps another document; leave out --document, or name another session")
        return ids
    if not document:
        raise UsageError(f"there is no session {path} yet: name the document to keep in it (--document FILE)")
    check_session(path)
    return document


def _checked(file: Saved, model: PreTrainedModel, tokenizer) -> tuple[list[int], list[int]]:
    """The document's token ids and the lengths of its prefill chunks. UsageError if the file does not fit the model."""
    ids, pieces = file.facts.get("ids"), file.facts.get("pieces")
    whole = all(isinstance(x, list) and all(type(i) is int and i >= 0 for i in x) for x in (ids, pieces))
    if file.facts.get("model") != fingerprint(model):
        reason = "was saved from another model, or with other adapters; open it with those, or prefill with these"
    elif tokenizer is not None and file.facts.get("tokenizer") not in (None, tokens_fingerprint(tokenizer)):
        reason = "was saved with another tokenizer; open it with that one, or prefill again"
    elif file.dtype != model.dtype:
        reason = f"holds {file.dtype} but the model computes in {model.dtype}; load the model in {file.dtype}"
    elif not whole or len(ids) != file.n or sum(pieces) != file.n or 0 in pieces:
        reason = "lacks the ids of its tokens; save it again"
    elif file.layers != model.config.get_text_config().num_hidden_layers:
        reason = f"holds {file.layers} layers, not the model's number; save it again"
    else:
        return ids, pieces
    raise UsageError(f"{file.path} {reason}")
