"""Opens what a lossless system streams its tensors through, and tells what was chosen."""

from collections.abc import Callable

from hillinfer.config import Settings
from hillinfer.pipeline.lookahead import Trial
from hillinfer.pipeline.memory import read_memory
from hillinfer.systems.hardware import check_path, open_device
from hillinfer.systems.lossless.plan import NEAR
from hillinfer.systems.lossless.tensors import HostPath, Tensors
from hillinfer.tiers.block_file import BLOCK, BlockFile
from hillinfer.tiers.geometry import Geometry

SPARE = 16 << 20  # bytes of a memory limit that are not counted on: the kernel's own pages for this process


def staggering(settings: Settings) -> Trial:
    """Cross-path where it is on, intra-path where it is off; "auto" tries both (DUAL-BLADE section 3.2)."""
    return Trial({"cross": True, "intra": False}.get(settings.pipelining, "auto"))


def check_device(settings: Settings) -> None:
    """UsageError for a device that must not be written to."""
    if settings.device is not None:
        check_path(settings.device)


def open_tensors(settings: Settings, geometry: Geometry, layers: int, staggered: Callable[[], bool]) -> Tensors:
    """Paths and budget of `settings.stream`. UsageError for a device that must not be written to."""
    direct = near = None
    safety = dict(checksums=settings.checksums, timeout=settings.timeout)
    try:
        if settings.device is None:
            options = dict(threads=settings.io_threads, engine=settings.engine)
            direct = BlockFile(settings.drive, **options, **safety)
        else:
            direct = open_device(settings.device, settings.io_threads, engine=settings.engine, **safety)
        if settings.stream == "host":
            near = HostPath()
        else:
            near = BlockFile(settings.drive, settings.io_threads, settings.engine, direct=False, **safety)
    finally:
        if near is None and direct is not None:
            direct.close()
    return Tensors(
        geometry,
        layers,
        near,
        direct,
        budget_of(settings),
        settings.max_tokens,
        staggered,
        prefetch=settings.lookahead is not False,
    )


def budget_of(settings: Settings) -> Callable[[int], int]:
    """Bytes that may stay near, given the bytes of the buffers: what the user gives, or what the system stands for."""

    def budget(pinned: int) -> int:
        if settings.stream == "page-cache":
            return 1 << 60
        if settings.stream == "direct":
            return 0
        if settings.host_budget is not None:
            return settings.host_budget
        return read_memory().budget(pinned + SPARE) if settings.stream == "dual" else 0

    return budget


def tell_tensors(tensors: Tensors, trial: Trial) -> str:
    """Where the tensors are, by which rung, and which pipeline was kept, in one line."""
    if tensors.plan is None:
        return "no KV yet"
    near = [extents for extents in tensors.plan.extents if extents[0].path == NEAR]
    bound = {path: blocks * BLOCK for path, blocks in tensors.plan.bound.items()}
    budget = tensors.plan.budget * BLOCK
    limit = "all" if budget >= 1 << 60 else f"a budget of {budget:,} bytes"
    text = f"{len(near)} of {len(tensors.tensors)} K and V tensors in {tensors.paths[NEAR].about} "
    text += f"({bound[NEAR]:,} bytes of {limit}), the rest ({bound['direct']:,} bytes) by "
    text += tensors.paths["direct"].about
    if trial.medians:
        kept, other = ("cross", "intra") if trial.on else ("intra", "cross")
        ms = {way: 1e3 * seconds for way, seconds in trial.medians.items()}
        text += f"; {kept}-path pipeline kept: {ms[trial.on]:.1f} ms a step, {other}-path {ms[not trial.on]:.1f}"
    elif trial.times is None:
        text += f"; {'cross' if trial.on else 'intra'}-path pipeline, as set"
    return text
