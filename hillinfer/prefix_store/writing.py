"""Write the blocks of a prefill behind its computation, each layer's records as soon as they exist."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from errno import ENOSPC
from functools import partial
from pathlib import Path

import torch

from hillinfer import files
from hillinfer.prefix_store.blocks import DRAFT, PrefixStore
from hillinfer.session_file import as_bytes, crc32, head
from hillinfer.tiers.log import Writer

OPEN = 400  # blocks that a cache reads or writes at once: each is an open file, of which a process has about 1,000


@dataclass(frozen=True)
class Pass:
    """An exact pass over several tokens."""

    start: int  # tokens in the cache before it
    ids: list[int]  # all tokens after it
    paths: list[Path]  # of the blocks that `ids` fill


class Draft:
    """A block that is being written: under a temporary name, and of its full length from the start."""

    def __init__(self, store: PrefixStore, path: Path, shape: Sequence[int], dtype: torch.dtype, facts: dict):
        (first, size), layers = head(shape, dtype, facts), shape[0]
        self.store, self.path, self.start, self.left = store, path, len(first), layers
        self.nbytes = torch.Size(shape[1:]).numel() * dtype.itemsize  # of a layer
        self.sums = torch.zeros(layers, 1, dtype=torch.int64, device="cpu")
        self.fd, self.draft = files.scratch(path.parent, DRAFT)
        try:
            os.truncate(self.fd, size)
            self._write(first, 0)
        except BaseException:
            self.drop()
            raise

    def add(self, layer: int, records: torch.Tensor) -> bool:
        """A layer's records (1, n, 2, Hkv, D). True if it was the last one, and the block has its name."""
        self.sums[layer] = crc32(data := as_bytes(records))
        self._write(data, self.start + layer * self.nbytes)
        self.left -= 1
        if not self.left:
            self._write(as_bytes(self.sums), self.start + len(self.sums) * self.nbytes)
            os.fsync(self.fd)
            with self.store.locked():  # a scan of the folder may list a file that is being renamed under neither name
                self.draft.replace(self.path)
            os.close(self.fd)
        return not self.left

    def drop(self) -> None:
        self.draft.unlink(missing_ok=True)
        os.close(self.fd)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        if os.pwrite(self.fd, data, offset) < len(data):
            raise OSError(ENOSPC, os.strerror(ENOSPC))


class BlockWriter:
    """Keeps what a cache's exact passes compute. All state but the counts belongs to the writing thread."""

    def __init__(self, store: PrefixStore, layers: int, family: str):
        self.store, self.layers, self.family = store, layers, family
        self.writer, self.drafts = Writer(), {}  # first token -> Draft
        self.tails: dict[int, tuple[int, torch.Tensor]] = {}  # layer -> records after its last whole block; their start
        self.kept, self.why = 0, ""  # blocks written, and why others were not

    def take(self, now: Pass, layer: int, kv: torch.Tensor) -> None:
        """A layer's records (1, m, 2, Hkv, D) of a pass. Waits while too much waits to be written."""
        self.writer.submit(kv.nbytes, partial(self._take, now, layer, kv))

    def settle(self) -> None:
        """Wait until all that was taken is on the disk."""
        self.writer.submit(0, lambda: None).result()

    def close(self) -> None:
        self.writer.close()
        self._drop()

    def _take(self, now: Pass, layer: int, kv: torch.Tensor) -> None:
        if layer == 0:
            self._drop()
        inside, rest = now.start % self.store.block, len(now.ids) % self.store.block
        base, (at, tail) = now.start - inside, self.tails.pop(layer, (0, kv[:, :0]))
        if inside and (at != base or tail.shape[1] < inside):
            return  # the cache was cropped to within a block whose first records are no longer at hand
        kv = torch.cat((tail[:, :inside], kv), 1)
        self.tails[layer] = len(now.ids) - rest, kv[:, kv.shape[1] - rest :].clone()
        try:
            if layer == 0:
                self._begin(now, base, kv)
            for at, draft in list(self.drafts.items()):
                if draft.add(layer, kv[:, at - base : at - base + self.store.block]):
                    del self.drafts[at]
                    self.kept += 1
            if layer == self.layers - 1:
                self.store.touch(now.paths)
        except Exception as error:  # no answer depends on it
            self._drop()
            self._say(getattr(error, "strerror", None) or str(error))

    def _begin(self, now: Pass, base: int, kv: torch.Tensor) -> None:
        """Open a draft for each block of the pass that the store lacks, as far as the quota allows."""
        size, paths = self.store.block, now.paths
        before, new = paths[: base // size], [path for path in paths[base // size :] if not path.exists()][:OPEN]
        if not new or len(self.store.known(before)) < len(before):
            return
        shape = self.layers, 1, size, *kv.shape[2:]
        nbytes = head(shape, kv.dtype, self._facts(new[0]))[1]
        with self.store.reserve(nbytes, len(new), paths) as count:
            for path in new[:count]:
                self.drafts[paths.index(path) * size] = Draft(self.store, path, shape, kv.dtype, self._facts(path))
        if count < len(new):
            self._say(f"its quota leaves room for {count} of {len(new)} blocks of {nbytes:,} bytes; raise it")

    def _facts(self, path: Path) -> dict:
        return {"block": path.stem, "family": self.family}

    def _say(self, why: str) -> None:
        if not self.why:
            warnings.warn(f"the store {self.store.folder} does not keep all of this prompt: {why}", stacklevel=2)
        self.why = why

    def _drop(self) -> None:
        while self.drafts:
            self.drafts.popitem()[1].drop()
