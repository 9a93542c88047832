"""Stored blocks as the first tokens of a cache on a drive: read where they lie, and never copied.

Any number of caches may share a block. A block that another process evicts stays readable for as long as it is open.
"""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import torch

from hillinfer.config import Settings
from hillinfer.errors import DriveError
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.reading import Blocks, Damaged
from hillinfer.session_file import crc32
from hillinfer.tiers.checksums import BLOCK, compare
from hillinfer.tiers.engines import Engine, open_engine
from hillinfer.tiers.log import HELD, RecordLog
from hillinfer.tiers.record_file import GAP, RecordFile
from hillinfer.tiers.records import Records
from hillinfer.tiers.tiered_store import READ


def lends(store: PrefixStore, settings: Settings) -> bool:
    """True if a cache may read from the store as it does from its drive: both are on one device, records lie in the
    store as they do on the drive, and no other form of them is needed there.
    """
    same = settings.drive is not None and Path(settings.drive).stat().st_dev == store.folder.stat().st_dev
    return same and settings.drive_kind == "ssd" and settings.stream is None and not settings.compress


class Spread:
    """An engine for a file that consists of several: offsets count through all of them, `region` bytes for each.

    engine  moves the bytes
    fds     of the files, int32 (m,)
    starts  byte of each file at which its region begins, (m,)
    """

    def __init__(self, engine: Engine, fds: np.ndarray, starts: np.ndarray, region: int):
        self.engine, self.fds, self.starts, self.region = engine, fds, starts, region
        self.name, self.close = engine.name, engine.close

    def transfer(self, write, fd, offsets, addresses, lengths, timeout, keep, sums=None, share=1) -> None:
        which, how = offsets // self.region, (timeout, keep, None, share)
        places = offsets - which * self.region + self.starts[which]
        try:
            self.engine.transfer(write, self.fds[which], places, addresses, lengths, *how)
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                raise
            for one in np.unique(which).tolist():  # file by file, as an offset alone does not say which failed
                own = which == one
                try:
                    self.engine.transfer(write, self.fds[which[own]], places[own], addresses[own], lengths[own], *how)
                except OSError as error:
                    error.offset = one * self.region + getattr(error, "offset", places[own][0]) - int(self.starts[one])
                    raise
        if sums is not None:
            compare(sums, offsets, addresses, lengths)


class Lent(RecordFile):
    """The blocks of a prompt as one read-only file of records, stream = layer. Closes `blocks`."""

    what = "blocks of a store"

    def __init__(self, blocks: Blocks, folder: Path, settings: Settings):
        self.blocks, count, first = blocks, np.arange(len(blocks.files)), blocks.files[0]
        self.record_shape, self.dtype = first.shape[2:], first.dtype
        record_bytes = torch.Size(self.record_shape).numel() * self.dtype.itemsize
        region = first.layers * first.n * record_bytes + GAP + BLOCK  # no request is joined across files
        self.fds = np.array([file.file.fileno() for file in blocks.files], np.int32)
        engine = open_engine(settings.engine, settings.io_threads)
        engine = Spread(engine, self.fds, np.array([file.start for file in blocks.files]), region)
        safety = dict(checksums=settings.checksums, timeout=settings.timeout)
        super().__init__(folder, record_bytes, first.layers, 1, 0, engine, **safety)
        self.starts, self.bases, self.lengths = count * first.n, count * region, np.full(len(count), first.n)

    @classmethod
    def fits(cls, blocks: Blocks) -> bool:
        """True if records begin with a block, as O_DIRECT needs: files of older releases need not."""
        nbytes = torch.Size(blocks.files[0].shape).numel() * blocks.files[0].dtype.itemsize
        return not nbytes % BLOCK and not any(file.start % BLOCK for file in blocks.files)

    def _open(self, direct: bool) -> tuple[int, bool]:
        try:
            for fd in self.fds.tolist():
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError:  # a file system without it
            direct = False
        return os.dup(self.fds[0]), direct

    def verified(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Records (1, n, 2, Hkv, D) of a layer, whose blocks are verified from now on; start and end are 0 and n.

        Raises Damaged.
        """
        try:
            records, _, nbytes = self.read_in_place(layer, np.arange(self.capacity))
        except DriveError as error:
            if self.stuck:  # which says nothing about a block
                raise
            at = error.__cause__.offset // self.engine.region
            raise Damaged(self.blocks.files[at].path, str(error)) from None
        parts = np.split(records, len(self.fds))
        for file, part in zip(self.blocks.files, parts, strict=True):
            if crc32(part) != file.sums[layer, 0]:
                raise Damaged(file.path, f"{file.path} is damaged: layer {layer} differs from what was saved")
        if self.sums:
            addresses = np.array([part.ctypes.data for part in parts])
            self.sums.note(self.offsets(layer, self.starts), addresses, np.full(len(parts), parts[0].nbytes))
        self.blocks.nbytes += nbytes
        return torch.from_numpy(records).view(self.dtype).view(1, -1, *self.record_shape)

    def log(self, *parts) -> "LentLog":
        return LentLog(*parts, lent=self)

    def close(self) -> None:
        super().close()
        self.blocks.close()


class LentLog(RecordLog):
    """A log whose first tokens are lent. The cache's own file holds those after them, from its beginning."""

    def __init__(self, *parts, lent: Lent):
        super().__init__(*parts)
        self.lent, self.base = lent, 0  # tokens that were lent

    @property
    def n(self) -> int:
        return self.base + super().n

    def append(self, records: torch.Tensor, codes=None) -> int:
        if self.lent is None or self.base == self.lent.capacity:
            return super().append(records)
        self.base += len(records)
        return 0

    def read(self, positions: np.ndarray, exact: bool = True) -> tuple[Records, int]:
        before = int(np.searchsorted(positions, self.base))
        if not before:
            return super().read(positions - self.base)
        data, rows, nbytes = self.lent.read_in_place(self.stream, positions[:before])
        stored = self._records(data, rows)
        if before == len(positions):
            return stored, nbytes
        own, more = super().read(positions[before:] - self.base)
        return Records(torch.cat((stored.tensor(), own.tensor()))), nbytes + more

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on. If some of them are lent, the others are copied to the cache's own file."""
        if n >= self.base:
            super().truncate(n - self.base)
            return
        self.flush()
        own = RecordLog(self.file, self.geometry, self.stream, self.writer)
        size = max(HELD, READ // self.file.record_bytes)
        for start in range(0, n, size):
            own.append(self.read(np.arange(start, min(start + size, n)))[0].tensor())
            own.flush()
        self.state, self.base, self.lent = own.state, 0, None
