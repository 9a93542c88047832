"""Compiles the C sources once with the system compiler, caches the library in a private folder, loads it with ctypes.

There is no build step at install time and no wheel per platform; without a compiler everything runs in torch and numpy.
The library's name contains a hash of sources, compiler and flags, so a stale one is never loaded.
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
OFF = "HILLINFER_NATIVE"  # 0 turns the kernels off
SANITIZE = "HILLINFER_SANITIZE"  # 1 builds them with AddressSanitizer and UBSan, for `make sanitize`
CHECKED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1".split()


class Unavailable(Exception):
    """There is no native library; one line that names the cause and the fix."""


def compiler() -> list[str] | None:
    """The C compiler command: $CC, otherwise the first of cc, gcc and clang."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else (["cc"], ["gcc"], ["clang"]):
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    return None


def build(command: list[str], folder: Path) -> Path:
    """Compile the library into `folder` unless it exists. Safe for concurrent processes: the last rename wins."""
    sources, flags = sorted(HERE.glob("*.c")), FLAGS + CHECKED if os.environ.get(SANITIZE) == "1" else FLAGS
    digest = hashlib.sha256()
    for path in [*sources, *sorted(HERE.glob("*.h"))]:
        digest.update(path.read_bytes())
    about = Path(command[0]).resolve().stat()
    digest.update(repr((command, about.st_size, about.st_mtime_ns, flags, platform.machine())).encode())
    target = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    for orphan in folder.glob("*.tmp"):  # left by a killed build; a live one times out long before this
        if orphan.lstat().st_mtime < time.time() - 600:
            shutil.rmtree(orphan, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(suffix=".tmp", dir=folder) as work:
            draft = Path(work) / target.name
            words = [*command, *flags, *map(str, sources), "-o", str(draft), "-lm"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise Unavailable(f"{command[0]} cannot compile the kernels: {(done.stderr.splitlines() or ['?'])[0]}")
            draft.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot compile the kernels: {error}") from None
    return target


def private_folder() -> Path:
    """A cache folder only this user can write to, as its content is executed; otherwise a temporary one."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hillinfer"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except (OSError, RuntimeError):  # RuntimeError: neither HOME nor a passwd entry
        pass
    return Path(_temporary_folder().name)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="hillinfer-")  # removed when the interpreter exits


@functools.cache
def load() -> ctypes.CDLL:
    """The library. Raises Unavailable, with a warning unless the kernels were turned off on purpose."""
    if os.environ.get(OFF) == "0":
        raise Unavailable(f"native kernels are turned off by {OFF}=0")
    try:
        return _load()
    except Unavailable as error:
        warnings.warn(f"{error}; hillinfer runs in torch and numpy, which is slower", stacklevel=2)
        raise


def _load() -> ctypes.CDLL:
    if platform.system() not in ("Linux", "Darwin"):
        raise Unavailable(f"native kernels are built on Linux and macOS only, not {platform.system()}")
    if (command := compiler()) is None:
        raise Unavailable("no C compiler was found: install gcc or clang, or name one in CC")
    try:
        return ctypes.CDLL(str(build(command, private_folder())))
    except OSError as error:
        raise Unavailable(f"the compiled kernels cannot be loaded: {error}") from None
