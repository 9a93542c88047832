"""Regular files, written atomically and never through links; a killed process leaves nothing behind.

Links, devices and pipes are refused: in a shared folder another user could point a name anywhere.
"""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hillinfer.errors import UsageError


def plain(path: str | Path) -> Path:
    """The absolute path of a regular file or a new one, its folder resolved. UsageError for links, folders, devices."""
    path = Path(path).expanduser()
    path = path.parent.resolve() / path.name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise UsageError(f"{path} is {kind}; name the file itself")
    return path


def open_plain(path: str | Path) -> int:
    """A read-only descriptor of a regular file. The check holds for the opened file, even if its name is replaced."""
    path = plain(path)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is not a regular file; name the file itself")
    return fd


def scratch(folder: Path, prefix: str, suffix: str = ".part", mode: int = 0o600) -> tuple[int, Path]:
    """A new temporary file. Its lock, held while it is open, distinguishes it from an orphan.

    Where the file system has no locks, `reclaim` can lock no orphan either and leaves all files alone.
    """
    while True:
        path = folder / f"{prefix}{secrets.token_hex(4)}{suffix}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)  # another process took it for an orphan before it was locked


def reclaim(folder: Path, prefix: str, suffix: str = ".part") -> list[Path]:
    """Remove and return the scratch files of killed processes. Files in use are left alone."""
    gone = []
    for path in folder.iterdir():
        if re.fullmatch(rf"{re.escape(prefix)}\w{{8}}{re.escape(suffix)}", path.name):
            with suppress(OSError, UsageError), os.fdopen(open_plain(path)) as file:  # in use, another user's, or gone
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                gone.append(path)
    return gone


@contextmanager
def replacing(path: str | Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write that atomically and durably replaces `path` on success."""
    path = plain(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}-"
    reclaim(path.parent, prefix)
    fd, draft = scratch(path.parent, prefix, mode=mode)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
            draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> Path:
    """Atomically write a report, profile or table as UTF-8, creating its folders. Returns the path."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    return Path(path)
