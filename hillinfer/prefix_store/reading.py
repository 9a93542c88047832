"""Read blocks: each is verified, and is what its name says."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hillinfer.errors import UsageError
from hillinfer.session_file import Saved


class Damaged(UsageError):
    """A block that cannot be used, at `path`."""

    def __init__(self, path: Path, why: str):
        super().__init__(why)
        self.path = path


class Blocks:
    """A prompt's first blocks, open for reading. Raises Damaged, here or on reading, for one that cannot be used."""

    def __init__(self, paths: Sequence[Path]):
        self.files: list[Saved] = []
        self.nbytes = 0  # read so far
        try:
            for path in paths:
                self.files.append(_open(path))
        except Damaged:
            self.close()
            raise

    @property
    def n(self) -> int:
        return sum(file.n for file in self.files)

    def read(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Verified records (1, n, 2, Hkv, D) of a layer; start and end are 0 and n."""
        parts = []
        for file in self.files:
            try:
                parts.append(file.read(layer, 0, file.n))
            except UsageError as error:
                raise Damaged(file.path, str(error)) from None
        self.nbytes += sum(part.nbytes for part in parts)
        return torch.cat(parts, 1)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _open(path: Path) -> Saved:
    try:
        file = Saved(path)
    except UsageError as error:
        raise Damaged(path, str(error)) from None
    if file.facts.get("block") != path.stem:
        file.close()
        raise Damaged(path, f"{path} holds another block than its name says")
    return file


def about(path: Path) -> tuple[str, str, int]:
    """Model family, dtype and tokens of a block; Damaged if it has no header."""
    file = _open(path)
    file.close()
    return str(file.facts.get("family")), str(file.dtype).removeprefix("torch."), file.n


def check(path: Path) -> str:
    """What is wrong with a block; empty if nothing is."""
    try:
        blocks = Blocks([path])
        for layer in range(blocks.files[0].layers):
            blocks.read(layer, 0, blocks.n)
        blocks.close()
    except Damaged as error:
        return str(error)
    return ""
