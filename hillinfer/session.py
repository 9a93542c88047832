"""Prefill once, ask many times: a document's KV saved to a file and opened again, in any process, under any system.

Opening gives the layers their records in the very pieces in which they first came, so codes, pools and windows are as
after the prefill, and so are the answers. The file is only read; every opened cache is private.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hillinfer import session_file as saved
from hillinfer.cache import TieredCache, TieredLayer, chunk_ends
from hillinfer.errors import UsageError
from hillinfer.session_file import Saved, SavedError
from hillinfer.systems.registry import find_system, make_cache

SAMPLE = 16  # values of each parameter that tell one model from another


def save_session(
    cache: TieredCache,
    path: str | Path,
    model: PreTrainedModel,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Save what the cache holds, the KV of the tokens `ids` of one sequence, atomically.

    With a tokenizer, opening with another one is refused. Raises UsageError for a cache that cannot be saved and for a
    place that holds something else, OSError where the disk is full; what was saved there before is untouched then.
    """
    layers = [layer.layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    if len(layers) < len(cache.layers):
        raise UsageError("layers with a sliding window cannot be saved; keep the prompt and prefill again")
    if not layers or cache.run.geometry is None or cache.run.geometry.batch != 1:
        raise UsageError("a session is one sequence: prefill one document, without padding, and save that")
    if len(ids) != cache.get_seq_length():
        raise UsageError(f"{len(ids)} token ids for {cache.get_seq_length()} cached tokens: give those of the document")
    geometry, n = cache.run.geometry, len(ids)
    facts = {"model": fingerprint(model), "ids": [int(i) for i in ids], "pieces": layers[0].pieces}
    if tokenizer is not None:
        facts["tokenizer"] = tokens_fingerprint(tokenizer)
    shape = (len(layers), 1, n, *geometry.record_shape)
    try:
        saved.save(Path(path), (layer.records() for layer in layers), shape, geometry.dtype, facts)
    except SavedError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise OSError(f"the session {path} was not saved: {error}") from error
    return Path(path)


def open_session(
    path: str | Path,
    model: PreTrainedModel,
    system: str = "hillinfer",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options,
) -> tuple[TieredCache, list[int]]:
    """A cache that holds a saved document's KV, and the document's token ids, for `generate(ids + question, ...)`.

    options  the fields of `Settings`. Raises UsageError for a file that is no session, or another model's, and for
    damage as soon as it is read.
    """
    if not find_system(system, options)[0].policy.late:
        raise UsageError(f"{system} chooses by the prompt's own queries, which no session keeps: prefill again for it")
    try:
        file = Saved(Path(path))
        ids, pieces = _checked(file, model, tokenizer)
        cache = make_cache(model, system, **options)
        try:
            start, layers = 0, range(len(cache.layers))
            for piece in pieces:
                for index, records in zip(layers, _ahead(file, layers, start, start + piece), strict=True):
                    records = records.to(model.device)
                    cache.layers[index].fill(*records.permute(2, 0, 3, 1, 4), records)
                start += piece
            cache.timeline.clear()
            cache.counters.clear()
        except BaseException:
            cache.close()
            raise
        file.close()
    except SavedError as error:
        raise UsageError(str(error)) from None
    return cache, ids


def _ahead(file: Saved, layers: range, start: int, end: int) -> Iterator[torch.Tensor]:
    """Each layer's records; the next layer's are read and checked meanwhile, where they are worth a thread."""
    if end - start < saved.PART:
        yield from (file.read(index, start, end) for index in layers)
        return
    with ThreadPoolExecutor(1, "hillinfer-open") as pool:
        coming = pool.submit(file.read, layers[0], start, end)
        for index in layers:
            records = coming.result()
            if index + 1 < len(layers):
                coming = pool.submit(file.read, index + 1, start, end)
            yield records


@torch.no_grad()
def keep_session(
    path: str | Path,
    model: PreTrainedModel,
    document: Sequence[int],
    system: str = "hillinfer",
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk: int | None = None,
    **options,
) -> TieredCache:
    """A cache that holds the document's KV: opened where a session is there, else prefilled (in chunks) and saved.

    Raises UsageError as `save_session` and `open_session` do, and where another document is kept there.
    """
    path, document = Path(path).expanduser(), list(document)
    if path.exists():
        session_ids(path, document)
        return open_session(path, model, system, tokenizer, **options)[0]
    check_session(path)
    cache = make_cache(model, system, **options)
    try:
        for start, end in pairwise(chunk_ends(len(document), chunk)):
            part = torch.tensor([document[start:end]], device=model.device)
            model(part, past_key_values=cache, logits_to_keep=1)
        save_session(cache, path, model, document, tokenizer)
    except BaseException:
        cache.close()
        raise
    return cache


def check_session(path: str | Path) -> None:
    """UsageError where a session could not be saved."""
    try:
        saved.check_target(Path(path))
    except SavedError as error:
        raise UsageError(str(error)) from None


def session_ids(path: str | Path, document: list[int]) -> list[int]:
    """The token ids of a session's document, without its KV. UsageError where `document` is given and another one."""
    try:
        ids = Saved(Path(path)).facts.get("ids")
    except SavedError as error:
        raise UsageError(str(error)) from None
    if not isinstance(ids, list) or (document and document != ids):
        raise UsageError(f"{path} keeps another document; leave out --document, or name another session")
    return ids


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart by their shape and a sample of every parameter."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if not name.startswith("_") and name not in ("transformers_version", "dtype", "torch_dtype")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def tokens_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells tokenizers apart by their tokens and numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _checked(file: Saved, model: PreTrainedModel, tokenizer) -> tuple[list[int], list[int]]:
    """The document's ids and the pieces it came in, if the file is this model's."""
    if file.facts.get("model") != fingerprint(model):
        raise SavedError(f"{file.path} was saved from another model; open it with that one, or prefill with this")
    if tokenizer is not None and file.facts.get("tokenizer") not in (None, tokens_fingerprint(tokenizer)):
        raise SavedError(f"{file.path} was saved with another tokenizer; open it with that one, or prefill anew")
    if file.dtype != model.dtype:
        raise SavedError(f"{file.path} holds {file.dtype} and the model computes in {model.dtype}; load it in that")
    ids, pieces = file.facts.get("ids"), file.facts.get("pieces")
    whole = all(isinstance(x, list) and all(type(i) is int and i >= 0 for i in x) for x in (ids, pieces))
    if not whole or len(ids) != file.n or sum(pieces) != file.n or 0 in pieces:
        raise SavedError(f"{file.path} does not say which tokens it holds; save it anew")
    if file.layers != model.config.get_text_config().num_hidden_layers or file.shape[0] != 1:
        raise SavedError(f"{file.path} holds {file.layers} layers of {file.shape[0]} sequences; save it anew")
    return ids, pieces
