"""Hooks on a model's forward pass: a cache's prompt is opened from a store as far as it is known, and kept in it.

Opened are whole blocks, at the prefill of an empty cache. Kept is what exact passes of several tokens compute: the KV of
a decode step depends on what the system selected.
"""

import re
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hillinfer.cache import TieredCache
from hillinfer.errors import UsageError
from hillinfer.fingerprint import fingerprint
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.filling import check_whole, fill
from hillinfer.prefix_store.writing import OPEN, BlockWriter, Pass
from hillinfer.session_file import Saved

SLICED = {"position_ids", "cache_position"}  # one entry for each token of the pass, in the last dimension
KNOWN = SLICED | {"input_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
ASKED = {"output_attentions", "output_hidden_states"}  # of all tokens


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


class Damaged(Exception):
    """A block that cannot be used."""

    def __init__(self, path: Path, why: str):
        super().__init__(why)
        self.path = path


class Keeper:
    """Between one cache, its model and a store. `report` says what came from the store; `open` asks it ahead of a pass.

    Raises UsageError for a model whose KV no store can hold.
    """

    def __init__(self, cache: TieredCache, model: PreTrainedModel, store: PrefixStore):
        check_whole(cache.support)
        check_positions(model.config)
        fingerprint(model)  # refuses weights that cannot be read
        self.cache, self.model, self.store = weakref.ref(cache), model, store
        self.owner, self.policy = cache.run.owner, cache.run.policy
        self.ids: list[int] = []  # the cache's first tokens, as far as exact passes have computed them
        self.now: Pass | None = None  # the pass under way
        self.root, self.report, self.told = "", Report(), set()
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
        """A layer has taken in records (B, m, 2, Hkv, D)."""
        if self.now is not None:
            self.writer.take(self.now, layer, kv)

    def open(self, ids: Sequence[int], leave: int = 2) -> int:
        """Fill the cache, which must be empty, with the longest known prefix of a prompt. Returns its length.

        leave  tokens that are computed in any case, for their logits; two, as a single one would be a decode step
        """
        start, cache = time.perf_counter(), self.cache()
        self.root, self.ids = self.store.root(fingerprint(self.model), self.model.dtype), []
        paths = self.store.chain(self.root, ids[: max(0, len(ids) - leave)])[:OPEN]
        self.report = Report(len(ids))
        while self.policy.late and (known := self.store.known(paths)):
            try:
                n = self._fill(cache, known)
            except Damaged as error:
                cache.reset()
                self._tell(f"a block of the store {self.store.folder} is of no use and was removed: {error}")
                with suppress(OSError):
                    error.path.unlink(missing_ok=True)
                paths = paths[: paths.index(error.path)]
                continue
            self.ids = list(ids[:n])
            self.report.opened, self.report.seconds = n, time.perf_counter() - start
            self.store.touch(known)
            break
        self.report.why = self._why(paths)
        return self.report.opened

    def _fill(self, cache: TieredCache, paths: list[Path]) -> int:
        """Fill the cache with these blocks. Returns their tokens. Damaged: nothing of the cache can be used."""
        with ExitStack() as stack:
            files = [stack.enter_context(closing(self._file(path, len(cache.layers)))) for path in paths]
            n = self.store.block

            def read(layer: int, start: int, end: int) -> torch.Tensor:
                parts = []
                for file in files:
                    try:
                        parts.append(file.read(layer, 0, n))
                    except UsageError as error:
                        raise Damaged(file.path, str(error)) from None
                self.report.nbytes += sum(part.nbytes for part in parts)
                return torch.cat(parts, 1)

            fill(cache, read, [n * len(files)], self.model.device)
        return n * len(files)

    def _file(self, path: Path, layers: int) -> Saved:
        try:
            file = Saved(path)
        except UsageError as error:
            raise Damaged(path, str(error)) from None
        if (file.facts.get("block"), file.layers, file.n) != (path.stem, layers, self.store.block):
            file.close()
            raise Damaged(path, f"{path} holds something else than its name says")
        return file

    def _why(self, paths: list[Path]) -> str:
        """Why tokens after the opened ones were computed."""
        opened, block = self.report.opened, self.store.block
        if not self.policy.late:
            why = f"{self.policy.__name__} selects by the prompt's queries, which no store keeps"
            self._tell(f"nothing is opened from the store {self.store.folder}: {why}")
            return why
        if self.report.asked < block + 2:
            return f"a block is {block} tokens, and the last two are always computed"
        if opened < len(paths) * block:
            if not opened and not self.store.holds(self.root):
                return "the store has no block of this model in this precision"
            return f"no prompt with the tokens {opened:,} to {opened + block - 1:,} of this one is in the store"
        return "the last tokens are always computed" if len(paths) < OPEN else f"at most {OPEN} blocks are opened"

    def _before(self, model, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        cache = self.cache()
        if kwargs is None or cache is None or kwargs.get("past_key_values") is not cache:
            return None  # torch drops a removed hook's kwargs flag first: another thread is closing its cache
        ids, held, self.now = args[0] if args else kwargs.get("input_ids"), cache.get_seq_length(), None
        del self.ids[held:]
        if held > len(self.ids) or (held and ids is not None and ids.shape[-1] == 1):
            return None
        if why := self._why_not(model, ids, args, kwargs):
            if not held:
                self.report = Report(0 if ids is None else ids.shape[-1], why=why)
                self._tell(f"the store {self.store.folder} is not used for this pass: {why}")
            return None
        new, cut, kept = ids[0].tolist(), 0, kwargs.get("logits_to_keep")
        if not held:
            last = isinstance(kept, int) and kept > 0 and not any(kwargs.get(name) for name in ASKED)
            cut = self.open(new, max(2, kept) if last else len(new))
            if not last:
                self.report.why = "logits, hidden states or attention of all tokens were asked for"
        whole = [*self.ids, *new[cut:]]
        self.now = Pass(held + cut, whole, self.store.chain(self.root, whole))
        if not cut:
            return None
        short = {name: part[..., cut:] for name, part in kwargs.items() if name in SLICED and part is not None}
        if not args:
            short["input_ids"] = ids[:, cut:]
        return (ids[:, cut:],) * len(args), kwargs | short

    def _after(self, model, args: tuple, kwargs: dict, output) -> None:
        cache = self.cache()
        if self.now is not None and cache is not None and kwargs.get("past_key_values") is cache:
            if cache.get_seq_length() == len(self.now.ids):  # otherwise it failed
                self.ids = self.now.ids
            self.now = None

    @staticmethod
    def _why_not(model, ids: torch.Tensor | None, args: tuple, kwargs: dict) -> str:
        """Why the KV of a pass may not be a function of its token ids alone; empty if it is."""
        if ids is None or ids.dim() != 2 or len(args) > 1:
            return "the pass has no token ids of one form (input_ids alone)"
        if len(ids) > 1:
            return "it has several sequences, and a prefix is opened for one: prefill them one by one"
        if odd := [name for name, value in kwargs.items() if value is not None and name not in KNOWN | ASKED]:
            return f"it has more than token ids ({', '.join(odd)})"
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or not mask.all()):
            return "it has a mask: a prefix has no padding"
        return "the model is in training mode: call model.eval()" if model.training else ""

    def _tell(self, text: str) -> None:
        """Warn, once for each text."""
        if text not in self.told:
            warnings.warn(text, stacklevel=2)
        self.told.add(text)


def check_positions(config: PretrainedConfig) -> None:
    """UsageError for a model whose positions, and so the KV of a prefix, depend on the length of the whole prompt."""
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
