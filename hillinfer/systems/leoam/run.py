"""A run of LeoAM: index pages and INT4 copies of the records on the drive."""

import math
from functools import partial

from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.evaluator.policy import Policy
from hillinfer.run import Run
from hillinfer.systems.leoam.compression import Compression
from hillinfer.systems.leoam.packed import PackedLog, PackedStore, packed_geometry
from hillinfer.systems.leoam.pages import Pages
from hillinfer.systems.leoam.policy import LeoAM
from hillinfer.systems.leoam.tree import NODES, PAGE
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import RecordLog
from hillinfer.tiers.record_file import RecordFile
from hillinfer.tiers.store import Store
from hillinfer.timeline import Track

INDEX_BYTES = 2 * NODES / PAGE  # size of the index per token and key channel


class LeoAMRun(Run):
    """`settings.compress` writes INT4 copies, for any policy; the policy `LeoAM` has its index pages on the drive."""

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        super().check_settings(settings)
        if settings.drive is not None and settings.drive_kind != "ssd":
            raise UsageError(f"chunk pages and INT4 records need an ssd: leave out --drive-kind {settings.drive_kind}")

    def _forget(self) -> None:
        super()._forget()
        self.index_budget = 0  # bytes of the host budget for the index
        self.packed: RecordFile | None = None
        self.compression = Compression()

    def open(self, geometry: Geometry) -> None:
        self.index_budget = self._index_budget()
        super().open(geometry)
        if self.settings.compress:
            self.packed = self.record_file(packed_geometry(geometry))
            self.compression = Compression(self.settings.compress)

    @property
    def records_budget(self) -> int | None:
        budget = self.settings.host_budget
        return None if budget is None else budget - self.index_budget

    def _index_budget(self) -> int:
        """Bytes of the host budget for the index: a quarter of it.

        With `max_tokens`, the size of the whole index, as far as the pinned records leave room for it, both with a
        margin of a quarter: each step searches the whole index. The length of the first append is no substitute: it
        may be the first chunk of a prompt, or the first turn of a conversation.
        """
        budget, size, tokens = self.settings.host_budget, self.geometry, self.settings.max_tokens
        if budget is None or not issubclass(self.policy or Policy, LeoAM):
            return 0
        if tokens is None:
            return budget // 4
        index = INDEX_BYTES * size.kv_heads * size.head_dim * self.layers * size.batch
        pinned = self.settings.pinned * self.token_bytes
        return int(min(1.25 * tokens * index, max(budget / 4, budget - 1.25 * tokens * pinned)))

    def open_store(self, track: Track) -> Store:
        if self.packed is None:
            return super().open_store(track)
        return self.tiered_store(PackedStore, track, self._open_packed_log)

    def _open_packed_log(self, stream: int) -> PackedLog:
        packed = RecordLog(self.packed, packed_geometry(self.geometry), stream, self.writer)
        log = self.drive, self.geometry, stream, self.writer
        return PackedLog(*log, packed=packed, compression=self.compression)

    def prepare(self, policy: Policy, layer: int) -> None:
        if isinstance(policy, LeoAM) and self.drive is not None:
            policy.open_pages = partial(self._open_pages, layer)

    def _open_pages(self, layer: int, row: int, shape: tuple) -> Pages:
        """Index pages of one sequence and layer on the drive, with a cache of its share of `index_budget`."""
        batch, capacity = self.geometry.batch, None
        if self.settings.host_budget is not None:
            capacity = self.index_budget // (self.layers * batch * math.prod(shape))
        track = Track(self.timeline, self.counters, layer)
        return Pages(shape, self.drive, layer * batch + row, capacity, track)

    def computed(self, seconds: float) -> None:
        attention = next((span for span in reversed(self.timeline.spans) if span.kind == "attend"), None)
        if attention is not None:
            self.compression.observe("compute", seconds + (attention.end_ns - attention.start_ns) / 1e9)

    def parts(self) -> list:
        return [*super().parts(), self.packed]
