"""Host memory: an upper-bound estimate of a run's needs, and the limit of the process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hillinfer.errors import UsageError

MIB = 1 << 20
UNLIMITED = 1 << 60  # bytes; cgroup v1 writes "no limit" as a number near 2^63
LIBRARIES = 320 * MIB  # anonymous memory of torch and transformers once imported, before any model (275 measured)
AT_WORK = 80 * MIB  # their further memory, beside tensors, while a model runs: lazy imports, threads, the allocator
PART = 512  # tokens of KV that torch's flash attention works on at once
LIMITS = {  # cgroup version: files with a limit, counter of anonymous memory, counter of shared memory
    "cgroup v1": (("memory.limit_in_bytes",), "total_rss", "total_shmem"),
    "cgroup v2": (("memory.max", "memory.high"), "anon", "shmem"),
}
FIX = "prefill in smaller chunks, lower host_budget or alpha, keep the KV on a drive, or raise the limit"


@dataclass(frozen=True)
class Memory:
    """A limit and the memory that already counts against it, in bytes."""

    limit: int
    anonymous: int
    shmem: int
    source: str

    def budget(self, pinned: int = 0) -> int:
        """Bytes left for the page cache, after `pinned` bytes of transfer buffers yet to be allocated."""
        return max(0, self.limit - self.anonymous - self.shmem - pinned)


def read_memory(root: Path = Path("/")) -> Memory:
    """The tightest limit on this process: its memory cgroup (v1 or v2), a parent group, or the machine.

    root  parent of /proc and /sys; tests pass a folder of their own

    Raises OSError or KeyError on a system without them.
    """
    available = read_fields(root / "proc/meminfo")["MemAvailable"] * 1024
    found = [Memory(available, 0, 0, "the machine's available memory")]
    for version, group in _groups(root):
        names, anonymous, shmem = LIMITS[version]
        for file in (group / name for name in names):
            try:
                limit, stat = file.read_text(encoding="utf-8").strip(), read_fields(group / "memory.stat")
            except OSError:
                continue  # the root group of v2 has no limits
            if limit != "max" and int(limit) < UNLIMITED:
                found.append(Memory(int(limit), stat[anonymous], stat[shmem], f"{version} {group.name}"))
    return min(found, key=Memory.budget)


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """This process's memory cgroup and its parents, as (version, folder)."""
    mounts = {}
    for line in (root / "proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup2":
            mounts["cgroup v2"] = folder
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts["cgroup v1"] = folder
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        version = "cgroup v1" if "memory" in controllers.split(",") else None if controllers else "cgroup v2"
        if version not in mounts:
            continue
        mount = root / mounts[version].lstrip("/")
        group = mount / path.lstrip("/")
        if not group.is_dir():
            group = mount  # in a container the path is the host's, but the mount is the container's
        while group != mount.parent:
            yield version, group
            group = group.parent


def read_fields(path: Path) -> dict[str, int]:
    """The numbers in lines of `name number` or `name: number kB`."""
    lines = (line.replace(":", " ").split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def check_libraries(root: Path = Path("/")) -> None:
    """UsageError if torch and transformers alone exceed the limit. Call it before importing them."""
    refuse({"torch and transformers": LIBRARIES + AT_WORK}, "use a machine or container with more", root)


def needs(run, shape, tokens: int, chunk: int | None = None, weights: int = 0) -> dict[str, int]:
    """Upper-bound estimate of host memory by component, in bytes.

    run      `Run` with settings and geometry
    shape    `ModelShape`; None estimates the KV alone
    tokens   final length of each sequence
    chunk    tokens per prefill chunk; None prefills all at once
    weights  bytes of the model's weights
    """
    rows, dense = run.batch * min(tokens, chunk or tokens), 0
    if shape is not None and run.geometry.device.type == "cpu":
        dense = 4 * rows * (6 * shape.hidden + 3 * shape.inner + 8 * shape.heads * shape.head_dim)
        dense += 6 * rows * min(PART, tokens) * shape.heads if run.settings.drive is not None else 0
    parts = {"weights": weights, f"prefill of {rows:,} tokens at once": dense, "libraries at work": AT_WORK}
    parts |= run.host_bytes(tokens)
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def refuse(parts: dict[str, int], fix: str, root: Path = Path("/")) -> None:
    """UsageError with an itemised sum if `parts` exceed the memory available to the process."""
    try:
        memory, need = read_memory(root), sum(parts.values())
    except (OSError, KeyError):
        return  # not Linux: the limit is unknown
    if need <= memory.budget():
        return
    used = memory.anonymous + memory.shmem
    has = f"{memory.source} has {_mib(memory.limit)}" + (f", less {_mib(used)} in use" if used else "")
    listed = " + ".join(f"{name} {_mib(nbytes)}" for name, nbytes in parts.items())
    raise UsageError(f"this run needs about {_mib(need)} of host memory ({listed}), but {has}: {fix}")


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // MIB):,} MiB"
