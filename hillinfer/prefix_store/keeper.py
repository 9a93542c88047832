"""Hooks on a model's forward pass: a cache's prompt is opened from a store as far as it is known, and kept in it.

Blocks are opened at the prefill of an empty cache. Kept is what exact passes of several tokens compute: the KV of a
decode step depends on what the system selected.
"""

import re
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hillinfer.cache import TieredCache
from hillinfer.errors import UsageError
from hillinfer.fingerprint import fingerprint
from hillinfer.models.support import check_supported
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.filling import check_whole, fill
from hillinfer.prefix_store.lending import Lent, lends
from hillinfer.prefix_store.passes import computed, ids_of, why_not, without_first
from hillinfer.prefix_store.reading import Blocks, Damaged
from hillinfer.prefix_store.writing import OPEN, BlockWriter, Pass


@dataclass
class Report:
    """Where the newest prompt came from.

    asked    its tokens
    opened   those of them that the store had
    nbytes   read from the store
    seconds  to find and open them
    why      the others were computed
    """

    asked: int = 0
    opened: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    why: str = "there was no prompt yet"

    def __str__(self) -> str:
        return (
            f"{self.opened:,} of {self.asked:,} prompt tokens came from the store in {self.seconds:.3f} s "
            f"({self.nbytes:,} bytes read); the others were computed: {self.why}"
        )


class Keeper:
    """Between one cache, its model and a store. `report` says what came from the store; `open` asks it ahead of a pass.

    Raises UsageError for a model whose KV no store can hold.
    """

    def __init__(self, cache: TieredCache, model: PreTrainedModel, store: PrefixStore):
        check_stored(model.config)
        fingerprint(model)  # refuses weights that cannot be read
        self.cache, self.model, self.store = weakref.ref(cache), model, store
        self.owner, self.policy = cache.run.owner, cache.run.policy
        self.ids: list[int] = []  # the cache's first tokens, as far as exact passes have computed them
        self.now: Pass | None = None  # the pass under way
        self.root, self.report = "", Report()
        self.writer = BlockWriter(store, len(cache.layers), model.config.model_type)
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the cache has no hooks."""

    def remove(self) -> None:
        """Finish what is to be written, and leave the model. A fork leaves its parent's files alone."""
        for hook in self.hooks:
            hook.remove()
        if self.owner.here:
            self.writer.close()

    def settle(self) -> int:
        """Wait until the blocks are on the disk. Returns how many this cache has written."""
        self.writer.settle()
        return self.writer.kept

    def take(self, layer: int, kv: torch.Tensor) -> None:
        """A layer has taken in records (1, m, 2, Hkv, D), or (Hkv, m, 2, 1, D) where each head selects for itself."""
        if self.now is not None:
            self.writer.take(self.now, layer, kv if len(kv) == 1 else kv.transpose(0, 3))

    def open(self, ids: Sequence[int], leave: int = 2) -> int:
        """Fill the cache, which must be empty, with the longest known prefix of a prompt. Returns its length.

        leave  number of tokens that are computed in any case
        """
        start, cache = time.perf_counter(), self.cache()
        self.root, self.ids = self.store.root(fingerprint(self.model), self.model.dtype), []
        paths = self.store.chain(self.root, ids[: max(0, len(ids) - leave)])[:OPEN]
        known, n = self.store.known(paths) if self.policy.late else [], 0
        self.report = Report(len(ids), why=self._why(len(ids), len(known), len(paths)))
        while known and not n:
            try:
                n = self._fill(cache, known)
            except Damaged as error:
                cache.reset()
                known, self.report.why = known[: known.index(error.path)], str(error)
                if error.path.exists():  # otherwise another process has just removed it
                    warnings.warn(f"a block of the store cannot be used and is computed again: {error}", stacklevel=2)
                with suppress(OSError):
                    error.path.unlink(missing_ok=True)
            except OSError as error:
                known, self.report.why = [], f"{error.strerror}: raise their limit (ulimit -n), or close caches"
            else:
                self.store.touch(known)
                self.ids, self.report.opened = list(ids[:n]), n
        self.report.seconds = time.perf_counter() - start
        return n

    def _fill(self, cache: TieredCache, known: list[Path]) -> int:
        """Fill the cache with blocks: lent to its drive, or copied. Returns the number of tokens."""
        blocks, run, read = Blocks(known, len(cache.layers)), cache.run, None
        try:
            if run.geometry is None and lends(self.store, run.settings) and Lent.fits(blocks):
                run.lent = Lent(blocks, self.store.folder, run.settings)
                read = run.lent.verified
            fill(cache, read or blocks.read, [blocks.n], self.model.device)
        finally:
            self.report.nbytes = blocks.nbytes
            if read is None:
                blocks.close()
        return blocks.n

    def _why(self, asked: int, known: int, possible: int) -> str:
        """Why tokens after the known blocks are computed."""
        block = self.store.block
        if not self.policy.late:
            why = f"{self.policy.__name__} selects by the prompt's queries, which no store keeps"
            warnings.warn(f"nothing is opened from the store: {why}", stacklevel=2)
            return why
        if known == possible:
            few = f"they do not fill a block of {block}, or are among the last, which give the logits"
            return f"at most {OPEN} blocks are opened" if known == OPEN else few
        if not known and not self.store.holds(self.root):
            return "the store has no block of this model in this precision"
        return f"no prompt with the tokens {known * block:,} to {known * block + block - 1:,} of this one was kept"

    def _before(self, model, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        cache = self.cache()
        if kwargs is None or cache is None or kwargs.get("past_key_values") is not cache:
            return None  # torch drops a removed hook's kwargs flag first: another thread is closing its cache
        ids, held, self.now = ids_of(args, kwargs), cache.get_seq_length(), None
        if held < len(self.ids):  # cropped; not in place, as the writing thread may still need the list
            self.ids = self.ids[:held]
        if held > len(self.ids) or (held and ids is not None and ids.shape[-1] == 1):
            return None
        if why := why_not(model, args, kwargs):
            if not held:
                self.report = Report(0 if ids is None else ids.shape[-1], why=why)
            warnings.warn(f"the store is not used for a pass: {why}", stacklevel=2)
            return None
        new, last, cut = ids[0].tolist(), computed(kwargs), 0
        if not held:
            cut = self.open(new, len(new) if last is None else last)
            if last is None:
                self.report.why = "logits, hidden states or attention of all tokens were asked for"
        whole = [*self.ids, *new[cut:]]
        self.now = Pass(held + cut, whole, self.store.chain(self.root, whole))
        return without_first(cut, args, kwargs) if cut else None

    def _after(self, model, args: tuple, kwargs: dict, output) -> None:
        cache = self.cache()
        if self.now is not None and cache is not None and kwargs.get("past_key_values") is cache:
            if output is not None:  # otherwise it failed
                self.ids = self.now.ids
            self.now = None


def check_stored(config: PretrainedConfig) -> None:
    """UsageError for a model whose KV no store can hold."""
    check_whole(check_supported(config))
    text = config.get_text_config(decoder=True)
    rope = str(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
    if found := re.search("dynamic|longrope", rope):
        raise UsageError(
            f"the KV of a prefix depends on the length of the prompt here (RoPE type {found[0]}), so no store can hold "
            "it: leave out the store"
        )


def use_store(cache: TieredCache, model: PreTrainedModel, store: PrefixStore | str | Path) -> None:
    """Open and keep prefixes of this cache's prompts, until it is closed."""
    cache.run.keeper = Keeper(cache, model, store if isinstance(store, PrefixStore) else PrefixStore(store))
    cache.hooks.append(cache.run.keeper)
