"""A temporary memory cgroup, version 1 or 2, for a `with` block."""

import os
import time
from pathlib import Path


class CgroupError(RuntimeError):
    """A memory cgroup cannot be created. The message names the requirement."""


class MemoryCgroup:
    """`join()` moves the calling process into the cgroup: its allocations and page cache then count towards `limit`."""

    def __init__(self, limit: int):
        parent, self.version, limit_file = _parent()
        self.folder = parent / f"hillinfer-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.folder.mkdir()
            (self.folder / limit_file).write_text(str(limit), encoding="utf-8")
        except OSError as error:
            if self.folder.exists():
                self.folder.rmdir()
            raise CgroupError(
                f"cannot create a memory cgroup in {parent} ({error.strerror}); run this as root"
            ) from None

    def join(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")

    def stat(self, name: str) -> int:
        """A field of memory.stat; 0 if this kernel lacks it."""
        lines = (line.split() for line in (self.folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(dict(lines).get(name, 0))

    def __enter__(self) -> "MemoryCgroup":
        return self

    def __exit__(self, *exc) -> None:
        for _ in range(50):  # a process that has just exited may still be listed
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def _parent() -> tuple[Path, str, str]:
    """Folder of the outermost memory cgroup, its version, and the name of its limit file."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(folder), "v1", "memory.limit_in_bytes"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, folder, kind, _ = line.split()[:4]
        if kind == "cgroup2" and "memory" in Path(folder, "cgroup.controllers").read_text(encoding="utf-8").split():
            try:
                Path(folder, "cgroup.subtree_control").write_text("+memory", encoding="utf-8")
            except OSError as error:
                raise CgroupError(f"{folder} does not allow memory limits ({error.strerror}); run as root") from None
            return Path(folder), "v2", "memory.max"
    raise CgroupError("no memory cgroup is mounted (v1 or v2); mount one as root")
