"""`hillinfer doctor`: what this machine supports and how fast it is, with the fix for each weakness, in ten seconds."""

import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hillinfer.commands.console import out
from hillinfer.config import check_folder
from hillinfer.errors import DriveError
from hillinfer.pipeline.memory import read_memory

# numpy is imported where it is used, as torch is: `doctor` must not slow down the start of the other commands.
LLAMA = 32 * 4096  # bytes of KV per token of a Llama-3-8B in bf16
CONTEXT = 32_768
KV = f"a Llama-3-8B's KV at {CONTEXT:,} tokens"
RECORD = 4096  # bytes; one layer's K and V of one token of that model
FILE = 256 << 20  # bytes of the file that is written and read
SECONDS = 0.6


@dataclass(frozen=True)
class Check:
    """One finding. If not `fine`: its cost and the fix."""

    name: str
    found: str
    fine: bool = True
    slow: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{'[green]ok  [/]' if self.fine else '[yellow]slow[/]'} {self.name:<16} {escape(self.found)}"]
        advice = [] if self.fine else [self.slow, f"fix: {self.fix}"]
        return "\n".join(lines + [f"{'':<21} {escape(line)}" for line in advice])


def doctor(
    drive: Annotated[Path, typer.Option(help="Folder on the drive that would hold the KV.")] = Path(),
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration of each measurement.")] = SECONDS,
):
    """Check and measure this machine; name each bottleneck and its fix."""
    for check in examine(check_folder(drive), seconds):
        out.print(str(check), highlight=False, soft_wrap=True)


def examine(folder: Path, seconds: float = SECONDS) -> Iterator[Check]:
    """All checks. `folder` is on the drive that would hold the KV; each measurement takes `seconds`."""
    yield from (gpu(), instructions(), compiler(), ring(), direct_io(folder), space(folder), memory_limit())
    yield from (raw_devices(), xrt(), *memory_speeds(seconds), *gpu_link_speed(seconds), drive_speed(folder, seconds))


def gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return Check("GPU", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")
    fix = "none needed for small models; for a large one, install torch for CUDA on a machine with a GPU"
    return Check("GPU", f"none, torch {torch.__version__}", False, "the model itself runs on the CPU", fix)


def instructions() -> Check:
    from hillinfer import native

    found = f"{platform.machine()}, {os.cpu_count()} cores, kernels for {', '.join(native.isas()) or 'none'}"
    slow = "scoring is slower than memory: AVX2 takes 2 times as long as AVX512-VNNI, plain C 10 times"
    fine = native.isa() not in ("generic", "none")
    return Check("instructions", f"{found}; in use: {native.isa()}", fine, slow, "see compiler, or use another machine")


def compiler() -> Check:
    from hillinfer import native
    from hillinfer.native import build

    found, reason = " ".join(build.compiler() or ["none"]), native.why_not() or ""
    slow = "scoring, selection and attention run in torch: 5 to 50 times slower"
    return Check("compiler", found if reason else f"{found}; kernels are compiled", not reason, slow, reason)


def ring() -> Check:
    from hillinfer.native import ring as io_uring

    reason, off = io_uring.why_not(), _text("/proc/sys/kernel/io_uring_disabled").strip() not in ("", "0")
    fix = "sysctl kernel.io_uring_disabled=0" if off else "Linux 5.6 or newer; in a container, allow io_uring_setup"
    slow = "tokens are read by threads: 1.1 to 1.6 times slower, twice the CPU"
    return Check("io_uring", f"no: {reason}" if reason else "yes", not reason, slow, fix)


def direct_io(folder: Path) -> Check:
    from hillinfer.tiers.block_file import BlockFile

    with warnings.catch_warnings(action="ignore"), closing(BlockFile(folder)) as file:
        kind = file_system(folder)
    slow = "KV goes through the page cache, which takes memory and does not help repeated passes"
    fix = f"name a folder on ext4, xfs or btrfs instead of {kind} with --drive"
    return Check("O_DIRECT", f"{'yes' if file.direct else 'no'}, {folder} ({kind})", file.direct, slow, fix)


def file_system(folder: Path) -> str:
    """The file system type of the folder's mount."""
    mounts = [line.split() for line in _text("/proc/mounts").splitlines()]
    over = [(len(where), kind) for _, where, kind, *_ in mounts if folder.is_relative_to(where)]
    return max(over)[1] if over else "an unknown file system"


def space(folder: Path) -> Check:
    free, need = shutil.disk_usage(folder).free, CONTEXT * LLAMA
    slow = f"{KV} takes {need / 1e9:.1f} GB, and generation would be refused"
    fix = "free some, or name a folder on another drive with --drive"
    return Check("free space", f"{free / 1e9:.0f} GB free in {folder}", free > need, slow, fix)


def memory_limit(root: Path = Path("/")) -> Check:
    """The memory limit that a run is planned for. `root` holds /proc and /sys."""
    try:
        memory = read_memory(root)
    except (OSError, KeyError):
        return Check("memory limit", "unknown: no /proc/meminfo here")
    size = f"{memory.limit / 2**30:.2f} GiB"
    if not memory.source.startswith("cgroup"):
        return Check("memory limit", f"none below {memory.source} of {size}")
    slow = "records, codes and page cache share it; beyond it the process is slowed down or killed"
    fix = "set --host-budget to a part of it, or raise the control group's memory.max and memory.high"
    return Check("memory limit", f"{size} by {memory.source}", False, slow, fix)


def raw_devices() -> Check:
    """Whole block devices that are not mounted and that this user may write to."""
    mounted, virtual = _text("/proc/mounts"), ("loop", "ram", "zram", "dm-", "sr", "md")
    names = sorted(path.name for path in Path("/sys/block").glob("*") if not path.name.startswith(virtual))
    free = [f"/dev/{name}" for name in names if f"/dev/{name}" not in mounted and os.access(f"/dev/{name}", os.W_OK)]
    return Check("raw device", ", ".join(free) or "none free and writable; a file performs as well, measured")


def xrt() -> Check:
    found = shutil.which("xrt-smi") or shutil.which("xbutil") or next(map(str, Path("/opt/xilinx").glob("xrt")), "")
    return Check("XRT (SmartSSD)", found or "none; a drive that scores can be emulated (--drive-kind emulated)")


def memory_speeds(seconds: float) -> Iterator[Check]:
    """Read bandwidth, and scoring of INT8 key codes (8 KV heads of 128 channels, 4 query heads each) against it."""
    import numpy as np
    import torch

    from hillinfer import native
    from hillinfer.evaluator.codes import head_scores

    words, threads = np.ones(8 << 20, np.uint64), torch.get_num_threads()
    read = native.read if native.available() else lambda words, threads=1: words.sum()
    one, every = (rate(words.nbytes, lambda n=n: read(words, n), seconds) for n in (1, threads))
    yield Check("memory", f"{one:.1f} GB/s one core, {every:.1f} with {threads} threads")
    rng = np.random.default_rng(0)
    codes, query = (torch.from_numpy(rng.integers(-127, 128, (8, n, 128), np.int8)) for n in (16_384, 4))
    speed = rate(codes.nbytes, lambda: head_scores(query, codes), seconds)
    step = CONTEXT * 32 * 1024 / speed / 1e6  # 32 layers
    slow = f"{speed / every:.0%} of memory bandwidth: {step:,.0f} ms per step of a Llama-3-8B at {CONTEXT:,} tokens"
    fix = "see compiler and instructions"
    yield Check("scoring INT8", f"{speed:.1f} GB/s of codes", speed > 0.3 * every, slow, fix)


def gpu_link_speed(seconds: float) -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        host = torch.empty(64 << 20, dtype=torch.uint8, device="cpu", pin_memory=True)
        speed = rate(host.nbytes, lambda: (host.to("cuda", non_blocking=True), torch.cuda.synchronize()), seconds)
        slow, fix = "every fetched token crosses it", "a PCIe 4 x16 slot"
        yield Check("host to GPU", f"{speed:.1f} GB/s, pinned", speed > 10, slow, fix)


def drive_speed(folder: Path, seconds: float) -> Check:
    """Sequential reads, random reads of a tenth of the records, and the implied time per token of a Llama-3-8B."""
    import numpy as np

    from hillinfer.tiers.record_file import RecordFile

    rng, n = np.random.default_rng(0), FILE // RECORD
    tenth, pieces = n // 10, np.arange(n).reshape(8, -1)
    records = rng.integers(0, 255, (len(pieces[0]), RECORD), np.uint8)
    in_order = cycle(pieces)
    try:
        with closing(RecordFile(folder, RECORD, 1)) as file:
            begin = time.perf_counter()
            for piece in pieces:
                file.write(0, int(piece[0]), records)
            written = FILE / (time.perf_counter() - begin) / 1e9
            stream = rate(records.nbytes, lambda: file.read_in_place(0, next(in_order)), seconds)
            choose = partial(rng.choice, n, tenth, replace=False)
            tokens = rate(tenth * RECORD, lambda: file.read_in_place(0, np.sort(choose())), seconds)
    except DriveError as error:
        return Check("drive", str(error), False, "it cannot store the KV cache", "name another folder with --drive")
    found = f"{stream:.2f} GB/s in order, {tokens:.2f} a tenth of the 4 KiB records, {written:.2f} written"
    every, some = CONTEXT * LLAMA / 1e9 / stream, CONTEXT * LLAMA / 1e10 / tokens
    slow = f"each new token would take {every:.1f} s to stream {KV}, or {some:.1f} s to read a tenth of it (arithmetic)"
    fix = "an idle NVMe drive: name a folder on it with --drive"
    return Check("drive", f"{found} ({file.engine.name})", stream > 1.5, slow, fix)


def rate(nbytes: int, work: Callable[[], object], seconds: float) -> float:
    """Median GB/s of `work` repeated for about `seconds`, after one warm-up."""
    work()
    speeds, until = [], time.perf_counter() + seconds
    while not speeds or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        speeds.append(nbytes / (time.perf_counter() - start) / 1e9)
    return statistics.median(speeds)


def _text(path: str) -> str:
    """The text of a kernel file such as /proc/mounts; empty if it does not exist."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
