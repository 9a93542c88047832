"""A memory cgroup of our own, version 1 or 2, for as long as a `with` block lasts."""

import os
import time
from pathlib import Path


class CgroupError(RuntimeError):
    """No memory cgroup can be made here. The message says what is needed."""


class MemoryCgroup:
    """`join()` puts the calling process in; its allocations and page cache then count against `limit`."""

    def __init__(self, limit: int):
        parent, self.version, limit_file = _parent()
        self.folder = parent / f"hillinfer-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.folder.mkdir()
            (self.folder / limit_file).write_text(str(limit))
        except OSError as error:
            if self.folder.exists():
                self.folder.rmdir()
            raise CgroupError(
                f"no memory cgroup can be made in {parent} ({error.strerror}); run this as root"
            ) from None

    def join(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def stat(self, name: str) -> int:
        """A field of memory.stat; 0 where this kernel has none of that name."""
        lines = (line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(dict(lines).get(name, 0))

    def __enter__(self) -> "MemoryCgroup":
        return self

    def __exit__(self, *exc) -> None:
        for _ in range(50):  # a process that has just ended may still be listed
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def _parent() -> tuple[Path, str, str]:
    """The folder of the outermost memory cgroup, its version, and its limit's file."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(folder), "v1", "memory.limit_in_bytes"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, _ = line.split()[:4]
        if kind == "cgroup2" and "memory" in Path(folder, "cgroup.controllers").read_text().split():
            try:
                Path(folder, "cgroup.subtree_control").write_text("+memory")
            except OSError as error:
                raise CgroupError(f"{folder} does not let memory be limited ({error.strerror}); run as root") from None
            return Path(folder), "v2", "memory.max"
    raise CgroupError("no memory cgroup is mounted (v1 or v2); mount one as root")
