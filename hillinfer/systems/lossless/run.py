"""A run of a lossless system: whole K and V tensors, streamed from their paths at every step."""

from hillinfer.config import Settings
from hillinfer.pipeline.lookahead import Trial
from hillinfer.pipeline.memory import UNLIMITED, read_memory
from hillinfer.run import Run
from hillinfer.systems.lossless.nvme import check_path, open_device
from hillinfer.systems.lossless.plan import DIRECT, NEAR
from hillinfer.systems.lossless.store import TensorStore
from hillinfer.systems.lossless.tensors import HostPath, Tensors
from hillinfer.tiers.block_file import BLOCK, BlockFile
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import BEHIND
from hillinfer.timeline import Track

SPARE = 16 << 20  # bytes of a memory limit left to the kernel's pages for this process


class StreamedRun(Run):
    """FlexGen and DUAL-BLADE. `settings.stream` selects the near path, `settings.device` the direct one.

    `trial` chooses the pipeline: cross-path if it is on, intra-path if it is off (DUAL-BLADE section 3.2).
    """

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        super().check_settings(settings)
        if settings.device is not None:
            check_path(settings.device)

    resident = True  # each layer's tensors are streamed to the model's device

    def _forget(self) -> None:
        super()._forget()
        self.tensors: Tensors | None = None

    def open(self, geometry: Geometry) -> None:
        settings = self.settings
        self.trial = Trial({"cross": True, "intra": False}.get(settings.pipelining, "auto"))
        how = dict(staggered=lambda: self.trial.on, prefetch=settings.lookahead is not False)
        paths = self._open_paths()
        self.tensors = Tensors(geometry, self.layers, paths, self._near_budget, settings.max_tokens, **how)

    def _open_paths(self) -> dict[str, BlockFile | HostPath]:
        settings = self.settings
        near = HostPath() if settings.stream == "host" else BlockFile(settings.drive, direct=False, **self.io)
        try:
            device = settings.device
            direct = BlockFile(settings.drive, **self.io) if device is None else open_device(device, **self.io)
        except BaseException:
            near.close()
            raise
        return {NEAR: near, DIRECT: direct}

    def _near_budget(self, buffers: int) -> int:
        """Bytes for the near path beside the transfer buffers: the user's limit, or the system's rule."""
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
        return {"KV in memory": near + 2 * kv // self.layers + min(BEHIND, kv)}  # transfer buffers, writes

    @property
    def drive_bytes(self) -> int:
        return self.tensors.size if self.tensors else 0

    def check(self, n: int) -> None:
        """Any length fits: tensors beyond the budget are streamed."""

    def why_split(self) -> str:
        """The tensors on each path, the I/O of each path and the pipeline, in one line."""
        tensors, trial, pipelines = self.tensors, self.trial, {True: "cross-path", False: "intra-path"}
        if tensors is None or tensors.plan is None:
            return "no KV yet"
        plan, near = tensors.plan, sum(extents[0].path == NEAR for extents in tensors.plan.extents)
        limit = "all" if plan.budget >= UNLIMITED // BLOCK else f"a budget of {plan.budget * BLOCK:,} bytes"
        text = f"{near} of {len(plan.extents)} K and V tensors in {tensors.paths[NEAR].about} "
        text += f"({plan.bound[NEAR] * BLOCK:,} bytes of {limit}), the rest ({plan.bound[DIRECT] * BLOCK:,} bytes) by "
        text += tensors.paths[DIRECT].about
        if trial.medians:
            kept, other = (f"{1e3 * trial.medians[way]:.1f}" for way in (trial.on, not trial.on))
            text += f"; {pipelines[trial.on]} pipeline kept: {kept} ms a step, {pipelines[not trial.on]} {other}"
        elif trial.times is None:
            text += f"; {pipelines[trial.on]} pipeline, as set"
        return text

    def parts(self) -> list:
        return [self.tensors]
