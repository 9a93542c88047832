"""hillinfer doctor: what this machine can do, what will be slow because of it, and the fix, within ten seconds."""

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

LLAMA = 32 * 4096  # bytes of KV for each token of a Llama-3-8B in bf16
CONTEXT = 32_768
PIECE = 256 << 20  # bytes of the file that is measured
SECONDS = 0.6  # for each measurement


@dataclass(frozen=True)
class Check:
    """One line: what there is, and where something is missing what that costs and what to do."""

    name: str
    found: str
    fine: bool = True
    slow: str = ""
    fix: str = ""


def doctor(
    drive: Annotated[Path, typer.Option(help="Folder on the drive that would hold the KV.")] = Path(),
    seconds: Annotated[float, typer.Option(min=0.1, help="For each of the measurements.")] = SECONDS,
):
    """What this machine can do, what will be slow because of it, and the fix."""
    from rich.console import Console
    from rich.markup import escape

    from hillinfer.config import check_folder

    out, folder = Console(), check_folder(drive)
    for check in examine(folder, seconds):
        mark = "[green]ok  [/]" if check.fine else "[yellow]slow[/]"
        out.print(f"{mark} {check.name:<16} {escape(check.found)}", highlight=False, soft_wrap=True)
        if not check.fine:
            out.print(f"     {'':<16} {escape(check.slow)}", highlight=False, soft_wrap=True)
            out.print(f"     {'':<16} fix: {escape(check.fix)}", highlight=False, soft_wrap=True)


def examine(folder: Path, seconds: float = SECONDS) -> Iterator[Check]:
    """All checks; `folder` is on the drive that would hold the KV."""
    yield from (gpu(), instructions(), compiler(), ring(), direct_io(folder), space(folder))
    yield from (cgroup(), raw_devices(), xrt())
    yield from bandwidths(folder, seconds)


def gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return Check("GPU", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")
    fix = "none is needed for small models; for a large one install torch for CUDA on a machine with a GPU"
    return Check("GPU", f"none, torch {torch.__version__}", False, "the model itself runs on the CPU", fix)


def instructions() -> Check:
    from hillinfer import native

    best = native.isa()
    found = f"{platform.machine()}, {os.cpu_count()} cores, kernels for {', '.join(native.isas()) or 'none'}"
    if best in ("avx512-vnni", "neon"):
        return Check("instructions", f"{found}; in use: {best}")
    slow = "scoring is slower than memory: AVX2 takes 2 times as long as AVX512-VNNI, plain C 10 times"
    return Check("instructions", f"{found}; in use: {best}", best == "avx2", slow, "see compiler, or another machine")


def compiler() -> Check:
    from hillinfer import native
    from hillinfer.native.build import compiler as command

    found = " ".join(command() or ["none"])
    if not (reason := native.why_not()):
        return Check("compiler", f"{found}; kernels are compiled")
    return Check(
        "compiler", found, False, "scoring, selection and attention run in torch: 5 to 50 times slower", reason
    )


def ring() -> Check:
    from hillinfer.native import ring as io_uring

    if not (reason := io_uring.why_not()):
        return Check("io_uring", "yes")
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    off = switch.exists() and switch.read_text().strip() != "0"
    fix = "sysctl kernel.io_uring_disabled=0" if off else "Linux 5.6 or newer; in a container allow io_uring_setup"
    return Check(
        "io_uring", f"no: {reason}", False, "tokens are read by threads: 1.1 to 1.6 times slower, twice the CPU", fix
    )


def direct_io(folder: Path) -> Check:
    import warnings

    from hillinfer.tiers.block_file import BlockFile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = BlockFile(folder)
    file.close()
    slow = "KV goes through the page cache, which keeps nothing of use on repeated passes, and takes its memory"
    fix = f"name a folder on ext4, xfs or btrfs instead of {file_system(folder)} with --drive"
    return Check(
        "O_DIRECT", f"{'yes' if file.direct else 'no'}, {folder} ({file_system(folder)})", file.direct, slow, fix
    )


def file_system(folder: Path) -> str:
    """The type of the mount that the folder is on."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    over = [(len(where), kind) for _, where, kind, *_ in mounts if folder.is_relative_to(where)]
    return max(over)[1] if over else "an unknown file system"


def space(folder: Path) -> Check:
    free, need = shutil.disk_usage(folder).free, CONTEXT * LLAMA
    found = f"{free / 1e9:.0f} GB free in {folder}"
    slow = f"a Llama-3-8B's KV at {CONTEXT:,} tokens takes {need / 1e9:.1f} GB, and generation would be refused"
    return Check("free space", found, free > need, slow, "free some, or name a folder on another drive with --drive")


def cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Check:
    """The memory limit of this process's control group, or of one above it."""
    try:
        group = root / own.read_text().strip().splitlines()[-1].split(":")[2].lstrip("/")
    except (OSError, IndexError):
        return Check("memory limit", "no control groups here")
    limits = []
    for folder in (group, *group.parents):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            limits += [int(text)] if text.isdigit() and int(text) < 1 << 60 else []
        if folder == root:
            break
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not limits or min(limits) >= total:
        return Check("memory limit", f"none below the machine's {total / 2**30:.1f} GiB")
    slow = "records, codes and page cache share that; beyond it the process is killed"
    fix = "give --host-budget a part of it, or raise the group's memory.max"
    return Check("memory limit", f"{min(limits) / 2**30:.2f} GiB by its control group", False, slow, fix)


def raw_devices() -> Check:
    """Whole block devices that nothing is mounted from and this user may write to."""
    mounted = Path("/proc/mounts").read_text() if Path("/proc/mounts").exists() else ""
    names = sorted(path.name for path in Path("/sys/block").glob("*")) if Path("/sys/block").exists() else []
    names = [name for name in names if not name.startswith(("loop", "ram", "zram", "dm-", "sr", "md"))]
    free = [f"/dev/{name}" for name in names if f"/dev/{name}" not in mounted and os.access(f"/dev/{name}", os.W_OK)]
    return Check("raw device", ", ".join(free) or "none that is free and writable; a file does as well, measured")


def xrt() -> Check:
    found = (
        shutil.which("xrt-smi")
        or shutil.which("xbutil")
        or ("/opt/xilinx/xrt" if Path("/opt/xilinx/xrt").exists() else "")
    )
    return Check("XRT (SmartSSD)", found or "none: a drive that scores is emulated (--drive-kind emulated)")


def bandwidths(folder: Path, seconds: float) -> Iterator[Check]:
    """Measured now: memory, scoring and the drive; and what that means for a Llama-3-8B, by arithmetic."""
    import numpy as np
    import torch

    from hillinfer import native
    from hillinfer.errors import DriveError
    from hillinfer.evaluator.codes import group_scores
    from hillinfer.tiers.record_file import RecordFile

    rng, cores = np.random.default_rng(0), torch.get_num_threads()
    words = np.ones(8 << 20, np.uint64)
    read = native.read if native.available() else lambda words, threads=1: words.sum()
    alone, all_cores = (rate(words.nbytes, lambda n=n: read(words, n), seconds) for n in (1, cores))
    yield Check("memory", f"{alone:.1f} GB/s one core, {all_cores:.1f} with {cores} threads")
    codes = torch.from_numpy(rng.integers(-127, 128, (8, 16_384, 128), np.int8))
    query = torch.from_numpy(rng.integers(-127, 128, (8, 4, 128), np.int8))
    scored = rate(codes.nbytes, lambda: group_scores(query, codes), seconds)
    step = CONTEXT * 32 * 1024 / scored / 1e6  # 32 layers of 8 KV heads by 128 channels
    slow = f"{scored / all_cores:.0%} of what memory gives: {step:,.0f} ms a step of a Llama-3-8B, {CONTEXT:,} tokens"
    fine = scored > 0.3 * all_cores
    yield Check("scoring INT8", f"{scored:.1f} GB/s of codes", fine, slow, "see compiler and instructions")
    if torch.cuda.is_available():
        yield _to_gpu(seconds)
    width, part = 4096, rng.integers(0, 255, (PIECE // 4096 // 8, 4096), np.uint8)
    try:
        file = RecordFile(folder, width, 1)
        try:
            start = time.perf_counter()
            for at in range(8):
                file.write(0, at * len(part), part)
            written = 8 * part.nbytes / (time.perf_counter() - start) / 1e9
            n, out = 8 * len(part), np.empty((len(part), width), np.uint8)
            turn = iter(range(10**9))

            def in_order() -> None:
                at = next(turn) % 8 * len(part)
                file.read(0, np.arange(at, at + len(part)), out)

            def scattered() -> None:
                file.read(0, np.sort(rng.choice(n, n // 10, replace=False)), out[: n // 10])

            stream = rate(part.nbytes, in_order, seconds)
            tokens = rate(n // 10 * width, scattered, seconds)
        finally:
            file.close()
    except DriveError as error:
        yield Check("drive", str(error), False, "nothing can be kept on it", "name another folder with --drive")
        return
    found = f"{stream:.2f} GB/s in order, {tokens:.2f} a tenth of the 4 KiB records, {written:.2f} written"
    kv = CONTEXT * LLAMA / 1e9
    slow = f"a Llama-3-8B's KV at {CONTEXT:,} tokens would take {kv / stream:.1f} s to stream for each new token, "
    slow += f"and a tenth of it {kv / 10 / tokens:.1f} s (arithmetic)"
    fix = "an idle NVMe drive: name a folder on it with --drive"
    yield Check("drive", f"{found} ({file.engine.name})", stream > 1.5, slow, fix)


def _to_gpu(seconds: float) -> Check:
    import torch

    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        host.to("cuda", non_blocking=True)
        torch.cuda.synchronize()

    speed = rate(host.nbytes, copy, seconds)
    return Check(
        "host to GPU", f"{speed:.1f} GB/s, pinned", speed > 10, "every fetched token crosses it", "a PCIe 4 x16 slot"
    )


def rate(nbytes: int, work: Callable[[], object], seconds: float) -> float:
    """Median GB/s of repeats for about so long, after one that is not counted."""
    work()
    speeds, until = [], time.perf_counter() + seconds
    while not speeds or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        speeds.append(nbytes / (time.perf_counter() - start) / 1e9)
    return statistics.median(speeds)
