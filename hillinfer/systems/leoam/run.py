"""A run of LeoAM: an index in pages on the drive, and INT4 copies of the records."""

import math
from functools import partial

from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.evaluator.policy import Policy
from hillinfer.run import Run
from hillinfer.systems.leoam.compression import Compression
from hillinfer.systems.leoam.packed import PackedStore, packed_geometry
from hillinfer.systems.leoam.pages import Pages
from hillinfer.systems.leoam.policy import LeoAM
from hillinfer.systems.leoam.tree import NODES, PAGE
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import RecordLog
from hillinfer.tiers.record_file import RecordFile
from hillinfer.tiers.store import Store
from hillinfer.timeline import Track

INDEX_BYTES = 2 * NODES / PAGE  # of LeoAM's index, for each token and key channel


class LeoAMRun(Run):
    """`settings.compress` makes INT4 copies, for any policy; `LeoAM` keeps its index in pages."""

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        super().check_settings(settings)
        if settings.drive is not None and settings.drive_kind != "ssd":
            raise UsageError(
                f"chunk pages and INT4 records are kept on an ssd only: leave out --drive-kind {settings.drive_kind}"
            )

    def _forget(self) -> None:
        super()._forget()
        self.index_budget = 0  # bytes of the host budget that are for the index
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
        """A quarter of the host budget; given the maximum context length, as much as the whole index needs, since each
        step searches all of it, if the pinned records leave that much. Both with a quarter to spare.

        The first append does not tell the length: it may be a prompt's first chunk, or a conversation's first turn.
        """
        budget, size, tokens = self.settings.host_budget, self.geometry, self.settings.max_tokens
        if budget is None or not issubclass(self.policy or Policy, LeoAM):
            return 0
        if tokens is None:
            return budget // 4
        index = INDEX_BYTES * size.kv_heads * size.head_dim * self.layers * size.batch
        pinned = self.settings.pin * self.token_bytes
        return int(min(1.25 * tokens * index, max(budget / 4, budget - 1.25 * tokens * pinned)))

    def open_store(self, track: Track) -> Store:
        if self.packed is None:
            return super().open_store(track)
        size, first = packed_geometry(self.geometry), track.layer * self.geometry.batch
        packed = [RecordLog(self.packed, size, first + row, self.writer) for row in range(size.batch)]
        return self.tiered_store(
            partial(PackedStore, compression=self.compression, packed=packed), track, self.open_log
        )

    def prepare(self, policy: Policy, layer: int) -> None:
        if isinstance(policy, LeoAM) and self.drive is not None:
            policy.open_pages = partial(self._open_pages, layer)

    def _open_pages(self, layer: int, row: int, shape: tuple) -> Pages:
        """Pages of one sequence's index in one layer, on the drive; `index_budget` says how many stay in memory."""
        streams = self.layers * self.geometry.batch
        budget = None if self.settings.host_budget is None else self.index_budget // (streams * math.prod(shape))
        return Pages(shape, self.drive, layer * self.geometry.batch + row, budget)

    def computed(self, seconds: float) -> None:
        attention = next((span for span in reversed(self.timeline.spans) if span.kind == "attend"), None)
        if attention is not None:
            self.compression.note("compute", seconds + (attention.end_ns - attention.start_ns) / 1e9)

    def parts(self) -> list:
        return [self.lookahead, self.writer, self.packed, self.drive]
