"""Read blocks: each is verified, and is what its name says."""

from collections.abc import Sequence
from errno import EMFILE, ENFILE
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
    """A prompt's first blocks, open for reading. Raises Damaged, here or on reading, for one that cannot be used;
    OSError where too many files are open.

    layers  that each must have; None for any number
    """

    def __init__(self, paths: Sequence[Path], layers: int | None = None):
        self.files: list[Saved] = []
        self.nbytes = 0  # read so far
        try:
            for path in paths:
                self.files.append(file := _open(path))
                first = self.files[0]
                if (file.shape, file.dtype, file.layers) != (first.shape, first.dtype, layers or first.layers):
                    raise Damaged(path, f"{path} has another shape than the model's KV")
        except (Damaged, OSError):
            self.close()
            raise

    @property
    def n(self) -> int:
        return sum(file.n for file in self.files)

    def read(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Verified records (1, n, 2, Hkv, D) of a layer; start and end are 0 and n."""
        out = torch.empty((1, self.n, *self.files[0].shape[2:]), dtype=self.files[0].dtype, device="cpu")
        for file, part in zip(self.files, out.split(self.files[0].n, 1), strict=True):
            try:
                file.read_into(part, layer)
            except UsageError as error:
                raise Damaged(file.path, str(error)) from None
        self.nbytes += out.nbytes
        return out

    def close(self) -> None:
        for file in self.files:
            file.close()


def _open(path: Path) -> Saved:
    try:
        file = Saved(path)
    except UsageError as error:
        if getattr(error.__context__, "errno", None) in (EMFILE, ENFILE):
            raise error.__context__ from None  # says nothing about the block
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
