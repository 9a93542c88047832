"""What a run needs of the host's memory, estimated before it starts, against what limit and machine leave it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hillinfer.errors import UsageError

MIB = 1 << 20
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63
LIBRARIES = 320 * MIB  # anonymous memory of torch and transformers once imported, before any model (275 measured)
AT_WORK = 80 * MIB  # what they take beside tensors while a model runs: code loaded late, threads, the allocator's own
BEHIND = 64 * MIB  # bytes that may wait to be written, as in `tiers.stream`, which loads torch
PART = 512  # tokens of KV that a prefill chunk attends to at once, as in `tiers.store`


@dataclass(frozen=True)
class Memory:
    """A limit and what already counts against it, in bytes."""

    limit: int
    anonymous: int
    shmem: int
    source: str

    def budget(self, pinned: int = 0) -> int:
        """Bytes left for the page cache beside `pinned` bytes of transfer buffers that are not allocated yet."""
        return max(0, self.limit - self.anonymous - self.shmem - pinned)


def read_memory(root: Path = Path("/")) -> Memory:
    """The tightest limit on this process: its memory cgroup (v1 or v2), one above it, or the machine.

    root   where /proc and /sys are found; tests give a folder of their own
    """
    available = _fields(root / "proc/meminfo")["MemAvailable"] * 1024
    found = [Memory(available, 0, 0, "the machine's available memory")]
    for version, group in _groups(root):
        limit_file, kinds = {
            "cgroup v1": ("memory.limit_in_bytes", ("total_rss", "total_shmem")),
            "cgroup v2": ("memory.max", ("anon", "shmem")),
        }[version]
        try:
            limit, stat = (group / limit_file).read_text().strip(), _fields(group / "memory.stat")
        except OSError:
            continue  # the root group of v2 has neither
        if limit != "max" and int(limit) < NO_LIMIT:
            found.append(Memory(int(limit), stat[kinds[0]], stat[kinds[1]], f"{version} {group.name}"))
    return min(found, key=Memory.budget)


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """This process's memory cgroup and those above it, as (version, folder)."""
    mounts = {}
    for line in (root / "proc/self/mounts").read_text().splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup2":
            mounts["cgroup v2"] = folder
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts["cgroup v1"] = folder
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        version = "cgroup v1" if "memory" in controllers.split(",") else None if controllers else "cgroup v2"
        if version not in mounts:
            continue
        mount = root / mounts[version].lstrip("/")
        group = mount / path.lstrip("/")
        if not group.is_dir():
            group = mount  # seen from inside a container, the path is the host's and the mount is ours
        while group != mount.parent:
            yield version, group
            group = group.parent


def _fields(path: Path) -> dict[str, int]:
    """Lines of `name number` or `name: number kB`."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def check_libraries(root: Path = Path("/")) -> None:
    """UsageError where even the libraries would not fit; before they are imported."""
    refuse({"torch and transformers": LIBRARIES + AT_WORK}, "use a machine or container with more", root)


def needs(run, shape, tokens: int, chunk: int | None = None, weights: int = 0) -> dict[str, int]:
    """Bytes of host memory by part, from above.

    run     `pipeline.run.Run` with settings and geometry
    shape   `pipeline.shapes.ModelShape` of the model; None for the KV alone
    tokens  of each sequence in all, prefilled `chunk` at once
    """
    settings, size = run.settings, run.geometry
    batch, record = size.batch, run.layers * size.batch * size.record_bytes  # one token, all layers
    streams = settings.stream is not None  # which attends to everything: it scores nothing, and keeps no codes
    codes = 0 if streams else run.layers * batch * tokens * size.kv_heads * size.head_dim
    rows = batch * min(tokens, chunk or tokens)
    dense, on_gpu = 0, size.device.type != "cpu"
    if shape is not None and not on_gpu:
        dense = 4 * rows * (6 * shape.hidden + 3 * shape.inner + 8 * shape.heads * shape.head_dim)
        dense += 6 * rows * min(PART, tokens) * shape.heads if settings.drive is not None else 0
    if settings.drive is None:
        resident = on_gpu and settings.host_budget is None
        kv = 0 if resident else tokens * record * 9 // 8 + tokens * record // run.layers  # a layer is copied to grow
    elif streams:
        near = 0 if settings.stream != "host" else min(settings.host_budget or 0, tokens * record)
        kv = near + 2 * tokens * record // run.layers + min(BEHIND, tokens * record)  # two layers' slots, writes
    else:
        behind = BEHIND if settings.host_budget is None else min(BEHIND, settings.host_budget // 4)
        kv = run.pool_tokens(tokens) * record + 2 * min(behind, tokens * record)
    parts = {
        "weights": weights,
        "KV in memory": kv,
        "codes and index": 3 * codes,  # codes and, of some policies, bounds beside them; an eighth for growth
        f"prefill of {rows:,} tokens at once": dense,
        "libraries at work": AT_WORK,
    }
    if settings.drive_kind == "emulated":
        parts["the emulated drive"] = codes + 2 * min(BEHIND, tokens * record)
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def refuse(parts: dict[str, int], fix: str, root: Path = Path("/")) -> None:
    """UsageError, with the arithmetic, where the sum of these parts is more than is left."""
    try:
        memory, need = read_memory(root), sum(parts.values())
    except (OSError, KeyError):
        return  # no Linux: nothing is known
    if need <= memory.budget():
        return
    held = memory.anonymous + memory.shmem
    less = f", less {_mib(held)} in use" if held else ""
    listed = " + ".join(f"{name} {_mib(nbytes)}" for name, nbytes in parts.items())
    raise UsageError(
        f"this run needs about {_mib(need)} of host memory ({listed}), but {memory.source} has {_mib(memory.limit)}"
        f"{less}: {fix}"
    )


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // MIB):,} MiB"


FIX = "prefill in smaller chunks, lower host_budget or alpha, keep the KV on a drive, or raise the limit"
