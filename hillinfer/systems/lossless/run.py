"""A run of a lossless system: whole K and V tensors, streamed from their paths at each step."""

from hillinfer.config import Settings
from hillinfer.pipeline.lookahead import Trial
from hillinfer.pipeline.memory import read_memory
from hillinfer.run import Run
from hillinfer.systems.lossless.devices import check_path, open_device
from hillinfer.systems.lossless.plan import DIRECT, NEAR
from hillinfer.systems.lossless.store import TensorStore
from hillinfer.systems.lossless.tensors import HostPath, Tensors
from hillinfer.tiers.block_file import BLOCK, BlockFile
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import BEHIND
from hillinfer.timeline import Track

SPARE = 16 << 20  # bytes of a memory limit that are not counted on: the kernel's own pages for this process
UNLIMITED = 1 << 60


class StreamedRun(Run):
    """FlexGen and DUAL-BLADE. `settings.stream` says which path is near, and `settings.device` where the direct one is.

    `trial` chooses the pipeline: cross-path where it is on, intra-path where it is off (DUAL-BLADE section 3.2).
    """

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        super().check_settings(settings)
        if settings.device is not None:
            check_path(settings.device)

    def _forget(self) -> None:
        super()._forget()
        self.tensors: Tensors | None = None

    def open(self, geometry: Geometry) -> None:
        settings = self.settings
        self.trial = Trial({"cross": True, "intra": False}.get(settings.pipelining, "auto"))
        near, direct = self._open_paths()
        prefetch = settings.lookahead is not False
        shape = geometry, self.layers, near, direct, self._near_budget, settings.max_tokens
        self.tensors = Tensors(*shape, lambda: self.trial.on, prefetch=prefetch)

    def _open_paths(self) -> tuple[BlockFile | HostPath, BlockFile]:
        """The near and the direct path."""
        settings, direct, near = self.settings, None, None
        options = dict(engine=settings.engine, **self.safety)
        try:
            if settings.device is None:
                direct = BlockFile(settings.drive, settings.io_threads, **options)
            else:
                direct = open_device(settings.device, settings.io_threads, **options)
            if settings.stream == "host":
                near = HostPath()
            else:
                near = BlockFile(settings.drive, settings.io_threads, direct=False, **options)
        finally:
            if near is None and direct is not None:
                direct.close()
        return near, direct

    def _near_budget(self, buffers: int) -> int:
        """Bytes that may stay near beside the transfer buffers: the user's limit, or the system's own rule."""
        settings = self.settings
        if settings.stream in ("page-cache", "direct"):
            return UNLIMITED if settings.stream == "page-cache" else 0
        if settings.host_budget is not None:
            return settings.host_budget
        return read_memory().budget(buffers + SPARE) if settings.stream == "dual" else 0

    def open_store(self, track: Track) -> TensorStore:
        return TensorStore(self.tensors, track.layer, track)

    def host_bytes(self, tokens: int) -> dict[str, int]:
        kv, limit = tokens * self.token_bytes, self.settings.host_budget or 0
        near = min(limit, kv) if self.settings.stream == "host" else 0
        return {"KV in memory": near + 2 * kv // self.layers + min(BEHIND, kv)}  # slots for two layers, and writes

    @property
    def drive_bytes(self) -> int:
        return self.tensors.size if self.tensors else 0

    def check(self, n: int) -> None:
        """Any length fits: the budget says what stays near, and the rest is streamed."""

    def why_split(self) -> str:
        """Where the tensors are, by which rung, and which pipeline was kept, in one line."""
        tensors, trial = self.tensors, self.trial
        if tensors is None or tensors.plan is None:
            return "no KV yet"
        near = [extents for extents in tensors.plan.extents if extents[0].path == NEAR]
        bound = {path: blocks * BLOCK for path, blocks in tensors.plan.bound.items()}
        budget = tensors.plan.budget * BLOCK
        limit = "all" if budget >= UNLIMITED else f"a budget of {budget:,} bytes"
        text = f"{len(near)} of {len(tensors.tensors)} K and V tensors in {tensors.paths[NEAR].about} "
        text += f"({bound[NEAR]:,} bytes of {limit}), the rest ({bound[DIRECT]:,} bytes) by "
        text += tensors.paths[DIRECT].about
        if trial.medians:
            kept, other = ("cross", "intra") if trial.on else ("intra", "cross")
            ms = {way: 1e3 * seconds for way, seconds in trial.medians.items()}
            text += f"; {kept}-path pipeline kept: {ms[trial.on]:.1f} ms a step, {other}-path {ms[not trial.on]:.1f}"
        elif trial.times is None:
            text += f"; {'cross' if trial.on else 'intra'}-path pipeline, as set"
        return text

    def parts(self) -> list:
        return [self.tensors]
