"""Compile the C sources once with the system's compiler, keep the library in a private folder, load it with ctypes.

What installs most surely: no build step, no wheel for each platform; and where there is no compiler everything runs in
torch and numpy. The name of the library holds a hash of sources, compiler and flags, so that no stale one is loaded.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = "-O3 -std=gnu11 -fPIC -shared -pthread -fopenmp-simd -fno-math-errno -fno-trapping-math".split()
OFF = "HILLINFER_NATIVE"  # set to 0, the library is not used


class Unavailable(Exception):
    """Why there is no native library, in one line, and the fix."""


def compiler() -> list[str] | None:
    """The C compiler's command: $CC, else the first of cc, gcc and clang."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else (["cc"], ["gcc"], ["clang"]):
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    return None


def build(command: list[str], folder: Path) -> Path:
    """The library in `folder`, compiled unless it is there. Two processes at once may: the last rename wins."""
    sources = sorted(HERE.glob("*.c"))
    digest = hashlib.sha256()
    for path in [*sources, *sorted(HERE.glob("*.h"))]:
        digest.update(path.read_bytes())
    about = Path(command[0]).resolve().stat()
    digest.update(repr((command, about.st_size, about.st_mtime_ns, FLAGS, platform.machine())).encode())
    target = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    for orphan in folder.glob("*.tmp"):  # of a build that was killed: none takes half as long
        if orphan.lstat().st_mtime < time.time() - 600:
            orphan.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        words = [*command, *FLAGS, *map(str, sources), "-o", name, "-lm"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Unavailable(f"{command[0]} cannot compile the kernels: {(done.stderr.splitlines() or ['?'])[0]}")
        Path(name).replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot compile the kernels: {error}") from None
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def private_folder() -> Path:
    """A folder that only this user can write to: what is loaded from it runs. Else one for this process alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "hillinfer"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except OSError:
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    keep = tempfile.TemporaryDirectory(prefix="hillinfer-")
    _own_folder.keep = keep  # removed at the interpreter's exit
    return Path(keep.name)


@functools.cache
def load() -> ctypes.CDLL:
    """The library. Raises Unavailable; the first time it also warns, and never again."""
    try:
        if os.environ.get(OFF) == "0":
            raise Unavailable(f"native kernels are turned off by {OFF}=0")
        if platform.system() not in ("Linux", "Darwin"):
            raise Unavailable(f"native kernels are built on Linux and macOS only, not {platform.system()}")
        if (command := compiler()) is None:
            raise Unavailable("no C compiler was found: install gcc or clang, or name one in CC")
        try:
            return ctypes.CDLL(str(build(command, private_folder())))
        except OSError as error:
            raise Unavailable(f"the compiled kernels cannot be loaded: {error}") from None
    except Unavailable as error:
        reason = str(error)
    if os.environ.get(OFF) != "0":
        warnings.warn(f"{reason}; hillinfer runs in torch and numpy, which is slower", stacklevel=2)
    raise Unavailable(reason)
