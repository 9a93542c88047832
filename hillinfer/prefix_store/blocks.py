"""The folder: one file per block of tokens, named by what it holds. The names are the only index.

    <model>-<depth>-<key>.kv

    model  digest of the model, its dtype, the block's length and the file format, 8 digits
    depth  number of blocks before this one in its prompt
    key    digest of the model and of all tokens up to the block's end, 32 digits

A block is a session file (`session_file`), so it is verified as it is read and is never seen half written. It is used
only after the blocks before it, so the times of last use fall with the depth and the least recently used go first.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from hillinfer import files
from hillinfer.config import parse_bytes
from hillinfer.errors import UsageError
from hillinfer.session_file import VERSION

BLOCK = 256  # tokens
QUOTA = "16GiB"
DRAFT = ".block-"  # prefix of files being written
NAME = re.compile(r"([0-9a-f]{8})-(\d{6})-[0-9a-f]{32}\.kv")


@dataclass(frozen=True)
class Block:
    path: Path
    nbytes: int
    used_ns: int  # time of last use

    @property
    def model(self) -> str:
        return self.path.name[:8]

    @property
    def depth(self) -> int:
        return int(self.path.name[9:15])


class PrefixStore:
    """A folder of blocks that any number of processes may share.

    folder  made if it is missing, for its owner alone
    quota   bytes of all files, such as "16GiB"; None for no limit
    block   tokens per block; blocks of another length are not found

    Raises UsageError if the folder can be neither read nor made.
    """

    def __init__(self, folder: str | Path, quota: int | str | None = QUOTA, block: int = BLOCK):
        self.folder, self.block = Path(folder).expanduser().absolute(), block
        self.quota = 1 << 62 if quota is None else parse_bytes(quota)
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            files.reclaim(self.folder, DRAFT)
        except OSError as error:
            raise UsageError(f"no store at {self.folder} ({error.strerror}); name another folder") from None

    def root(self, fingerprint: str, dtype) -> str:
        """Digest of what every block of a model depends on beside its tokens."""
        return _digest(f"{fingerprint} {dtype} {self.block} {VERSION}".encode())

    def chain(self, root: str, ids: Sequence[int]) -> list[Path]:
        """Paths of the blocks that these tokens fill, whether they exist or not."""
        key, paths, tokens = root, [], np.array(ids, "<i8")
        for depth in range(len(ids) // self.block):
            key = _digest(key.encode() + tokens[depth * self.block : (depth + 1) * self.block].tobytes())
            paths.append(self.folder / f"{root[:8]}-{depth:06}-{key[:32]}.kv")
        return paths

    def known(self, paths: Sequence[Path]) -> list[Path]:
        """The first of these blocks, up to the first that is missing."""
        return list(takewhile(Path.exists, paths))

    def holds(self, root: str) -> bool:
        """True if there are blocks of this model."""
        return any(block.model == root[:8] for block in self.blocks())

    def touch(self, paths: Sequence[Path]) -> None:
        """Note the use of a prompt's first blocks. A store that cannot be written to keeps its times."""
        now = time.time_ns()
        for depth, path in enumerate(paths):
            with suppress(OSError):
                os.utime(path, ns=(now - depth, now - depth))

    def blocks(self) -> list[Block]:
        """All blocks, the most recently used first."""
        found = [block for block in self.files() if NAME.fullmatch(block.path.name)]
        return sorted(found, key=lambda block: (-block.used_ns, block.depth))

    def prune(self, quota: int) -> int:
        """Remove the least recently used blocks until all files take at most `quota` bytes. Returns what they take."""
        with self.locked():
            return self._prune(quota)

    @contextmanager
    def reserve(self, nbytes: int, count: int, own: Collection[Path]) -> Iterator[int]:
        """How many of `count` new files of `nbytes` each fit into the quota, once others than `own` made room.

        No other process makes room meanwhile. Raises OSError for a store that cannot be written to.
        """
        with self.locked():
            used = self._prune(self.quota - count * nbytes, own)
            yield max(0, min(count, (self.quota - used) // nbytes))

    def _prune(self, most: int, own: Collection[Path] = ()) -> int:
        used = sum(file.nbytes for file in self.files())
        for block in reversed(self.blocks()):
            if used > most and block.path not in own:
                block.path.unlink(missing_ok=True)
                used -= block.nbytes
        return used

    def files(self) -> Iterator[Block]:
        """Blocks and drafts. A draft has its full length from the start, so it counts as what it will be."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) or entry.name.startswith(DRAFT):
                    with suppress(FileNotFoundError):  # removed by another process
                        stat = entry.stat(follow_symlinks=False)
                        yield Block(Path(entry.path), stat.st_size, stat.st_mtime_ns)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process makes room, or gives a block its name, meanwhile."""
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
