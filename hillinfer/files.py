"""Files that lie where they were named, are whole or absent, and are not left behind by a kill.

No link is followed and no device or pipe opened where a plain file is meant: a name in a folder that others may write
to could otherwise lead anywhere.
"""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class Refused(OSError):
    """The place is not one where this file may be. One line that names the fix; nothing was written."""


def plain(path: str | Path) -> Path:
    """The absolute path, its folder resolved, if it is a plain file or nothing yet. Refused otherwise."""
    path = Path(path).expanduser()
    path = path.parent.resolve() / path.name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no plain file"
        raise Refused(f"{path} is {what}; name the file itself")
    return path


def open_plain(path: str | Path) -> int:
    """A descriptor to read a plain file. What was checked is what is read, whatever happens to the name meanwhile."""
    path = plain(path)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Refused(f"{path} is no plain file; name the file itself")
    return fd


def scratch(folder: Path, prefix: str, suffix: str = ".part", mode: int = 0o600) -> tuple[int, Path]:
    """A new file, locked for as long as it is open: that tells it from an orphan."""
    while True:
        path = folder / f"{prefix}{secrets.token_hex(4)}{suffix}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)  # another start took it for an orphan before it was locked


def reclaim(folder: Path, prefix: str, suffix: str = ".part") -> list[Path]:
    """Remove the scratch files that killed processes have left; returns them. Those in use are left alone."""
    gone = []
    for path in folder.iterdir():
        if not re.fullmatch(rf"{re.escape(prefix)}\w{{8}}{re.escape(suffix)}", path.name):
            continue
        try:
            fd = open_plain(path)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            gone.append(path)
        except OSError:
            continue  # in use, another user's, or gone
        finally:
            os.close(fd)
    return gone


@contextmanager
def replacing(path: str | Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` if all goes well: whole, on the disk, or not at all."""
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
    """Write a report, profile or table as UTF-8, whole or not at all; folders are made. Returns the path."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    return Path(path)
