"""The state that the layers of one cache share: settings, the record of the run, the drive and the hit table."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

from hillinfer.config import Settings, check_folder
from hillinfer.errors import UsageError
from hillinfer.evaluator.policy import Policy
from hillinfer.native import ring
from hillinfer.pipeline.lookahead import AHEAD, Lookahead, Trial
from hillinfer.pipeline.memory import FIX, needs, refuse
from hillinfer.pipeline.ownership import CacheOwner
from hillinfer.pipeline.pool_size import pool_tokens
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import PLACEMENTS, SharedHits
from hillinfer.tiers.log import BEHIND, RecordLog, Writer
from hillinfer.tiers.record_file import RecordFile
from hillinfer.tiers.store import HostStore, Store
from hillinfer.tiers.tiered_store import READ, TieredStore
from hillinfer.tiers.window import Window
from hillinfer.timeline import Counters, Timeline, Track


class Run:
    """The shared state of a cache whose KV lies in memory, or on an SSD behind a hot pool.

    `start` opens the drive and its threads once the shape of the first keys is known; `stop` closes them, and `start`
    may follow. A system with other tiers subclasses it: `open` and `open_store` make the tiers, `pool_tokens`, `check`
    and `host_bytes` size them, `why_split` explains them.
    """

    def __init__(self, settings: Settings, layers: int, policy: type[Policy] | None = None):
        self.settings, self.layers, self.policy = settings, layers, policy
        self.timeline, self.counters, self.owner = Timeline(), Counters(), CacheOwner(layers)
        self.keeper: Any = None  # is given the records of all layers (`prefix_store.keeper.Keeper`)
        self.observer: Any = None  # sees the attended records (`workbench.observe.AttentionRecord`)
        self.heads = 1  # rows of a sequence: its KV heads, if each selects for itself
        self.attended_ns: int | None = None  # when a layer's attention last ended in a decode step
        self._forget()
        self.check_settings(settings)
        check_folder(settings.drive)

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        """UsageError for settings that cannot work here."""
        wing = settings.stream is not None or (settings.drive is not None and settings.drive_kind != "ssd")
        if cls is Run and (wing or (settings.drive is not None and settings.compress)):
            raise UsageError("these settings need the run of a system: open the cache with hillinfer.make_cache")
        if settings.engine == "io_uring" and (reason := ring.why_not()):
            raise UsageError(f"{reason} (engine io_uring was asked for; auto takes what there is)")

    def _forget(self) -> None:
        self.geometry: Geometry | None = None
        self.drive = None
        self.lent: Any = None  # stored blocks that hold the first tokens (`prefix_store.lending.Lent`)
        self.hits: SharedHits | None = None  # the table that all layers share, if they do
        self.writer: Writer | None = None
        self.lookahead: Lookahead | None = None
        self.trial: Trial | None = None  # finds out whether to look ahead
        self.stores: dict[int, TieredStore] = {}  # by layer
        self.mask: tuple = None, None  # of this step on the model's device, and in host memory
        self.later: Any = None  # what a GPU has yet to say (`models.later.Later`)

    @property
    def resident(self) -> bool:
        """True if records are to be on the model's device."""
        return self.settings.drive is None and self.settings.host_budget is None

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.geometry.batch // self.heads if self.geometry else 1

    def start(self, geometry: Geometry, tokens: int = 0) -> None:
        """Fix the shape at the first append, of `tokens` tokens, and open the drive if there is one.

        UsageError where there is too little memory, or where layers differ in shape.
        """
        if self.geometry is None:
            self.geometry = geometry
            try:
                refuse(needs(self, None, max(tokens, self.settings.max_tokens or 0)), FIX)
            except UsageError:
                self.geometry = None
                raise
            if self.settings.drive is not None:
                self.open(geometry)
        elif (own := self.geometry).device != geometry.device:
            fix = "load the model on one device, or keep its KV in host memory (host_budget, drive)"
            raise UsageError(f"layers on {own.device} and {geometry.device}: {fix}")
        elif own != geometry:
            raise UsageError(f"layers of different shapes or batches ({own} and {geometry}) cannot share a drive file")

    def open(self, geometry: Geometry) -> None:
        """Open the drive and the threads around it."""
        settings = self.settings
        if (kind := PLACEMENTS[settings.placement]).shared:
            self.hits = kind(geometry.batch)
        self.drive = self.open_drive(geometry)
        self.lookahead, self.trial = Lookahead(), Trial(settings.lookahead, AHEAD)
        self.writer = Writer(self.write_behind)

    def open_drive(self, geometry: Geometry):
        return self.record_file(geometry)

    def record_file(self, geometry: Geometry) -> RecordFile:
        """A private file on the drive for records of this shape, of all layers and sequences."""
        shape = geometry.record_bytes, self.layers * geometry.batch, geometry.batch
        return RecordFile(self.settings.drive, *shape, **self.io)

    @property
    def io(self) -> dict:
        """Options of every file on the drive."""
        settings = self.settings
        safety = dict(checksums=settings.checksums, timeout=settings.timeout)
        return dict(threads=settings.io_threads, engine=settings.engine, **safety)

    def open_store(self, track: Track) -> Store:
        """One layer's store."""
        if self.drive is None:
            return HostStore(self.geometry, track, self.settings.max_tokens or 0)
        return self.tiered_store(TieredStore, track, self.open_log)

    def tiered_store(self, kind: type[TieredStore], track: Track, open_log: Callable[[int], Any]) -> TieredStore:
        """A store with a window and a pool over logs, stream = layer * batch + sequence."""
        size, settings = self.geometry, self.settings
        logs = [open_log(track.layer * size.batch + row) for row in range(size.batch)]
        hits = self.hits or PLACEMENTS[settings.placement](size.batch)
        rest = Window(size, settings.sinks, settings.recent), settings.pinned, self.pool_tokens, self.lookahead.reader
        self.stores[track.layer] = kind(size, track, logs, hits, *rest, self.stores)
        return self.stores[track.layer]

    def open_log(self, stream: int) -> RecordLog:
        return (RecordLog if self.lent is None else self.lent.log)(self.drive, self.geometry, stream, self.writer)

    def prepare(self, policy: Policy, layer: int) -> None:
        """Configure a layer's policy before `Policy.start`."""

    @property
    def records_budget(self) -> int | None:
        """Bytes of the host budget that are for KV records."""
        return self.settings.host_budget

    @property
    def write_behind(self) -> int:
        """Bytes of records that may wait to be written."""
        budget = self.settings.host_budget
        return BEHIND if budget is None else min(BEHIND, budget // 4)

    @property
    def token_bytes(self) -> int:
        """One token's records in all layers and sequences."""
        return self.layers * self.geometry.batch * self.geometry.record_bytes

    def host_bytes(self, tokens: int) -> dict[str, int]:
        """Upper-bound estimate of host memory for KV and codes of this many tokens, by component."""
        budget, kv, size = self.settings.host_budget, tokens * self.token_bytes, self.geometry
        if self.settings.drive is not None:
            held = self.pool_tokens(tokens) * self.token_bytes + 2 * min(kv, self.write_behind + 2 * READ)
        elif size.device.type != "cpu" and budget is None:
            held = 0
        else:
            held = kv * 9 // 8 + kv // self.layers  # a buffer that grows is copied
        return {"KV in memory": held, "codes and index": 3 * self.code_bytes(tokens)}  # bounds beside codes, growth

    def code_bytes(self, tokens: int) -> int:
        """INT8 key codes of all layers and sequences."""
        return self.layers * self.geometry.batch * tokens * self.geometry.kv_heads * self.geometry.head_dim

    @property
    def drive_bytes(self) -> int:
        """Reserved on the drive."""
        return getattr(self.drive, "size", 0)

    def pool_tokens(self, n: int) -> int:
        """Hot pool size in tokens, for each layer and sequence, at n cached tokens."""
        return pool_tokens(self.settings, n, self.token_bytes, self.records_budget)

    def why_split(self) -> str:
        """The pool's size and its reason, in one line."""
        budget, alpha = self.settings.host_budget, self.settings.alpha
        if self.drive is None:
            return "all KV in memory: no drive was named"
        if budget is not None:
            return f"host holds as much as the budget allows; no profile was given, at most {budget:,} bytes"
        return f"host holds 2*alpha = {2 * alpha:.0%} of the tokens; no profile was given"

    def check(self, n: int) -> None:
        """UsageError where n tokens cannot be held within the budget."""
        budget = self.records_budget
        if budget is None:
            return
        pin, on_drive = self.settings.pinned, self.settings.drive is not None
        held = math.ceil(pin * n) if on_drive else n
        need = held * self.token_bytes
        if need <= budget:
            return
        if not on_drive:
            raise UsageError(
                f"{n} tokens of KV take {need:,} bytes but the host budget for them is {budget:,}: "
                "name a drive folder for the rest, or raise the budget"
            )
        raise UsageError(
            f"the newest {pin:.0%} = {held} of {n} tokens are pinned in host memory and take {need:,} bytes, "
            f"but the host budget for them is {budget:,}: raise it to that, or lower pinned"
        )

    def begin_layer(self, track: Track, tokens: int) -> None:
        """A layer takes in `tokens` new tokens of each sequence; with the first layer a step begins.

        The time between one layer's attention and the next one's keys is the model's own work: a dense span.
        """
        if self.attended_ns is not None and tokens == 1:
            lane = "gpu" if track.away or self.geometry.device.type != "cpu" else "cpu"
            end = track.add(lane, "dense", self.attended_ns)
            self.computed((end - self.attended_ns) / 1e9)
        self.attended_ns = None
        if track.layer == 0:
            self.timeline.step += 1
            self.begin_step(tokens)

    def begin_step(self, tokens: int) -> None:
        if self.trial is not None:
            if tokens == 1:
                self.trial.step(time.perf_counter())
            else:
                self.trial.pause()
        if self.hits is not None:
            self.hits.age()

    def stop_guessing(self, error: Exception) -> None:
        """Look ahead no more in this run: a guess is only ever a help."""
        if self.trial is not None and self.trial.on:
            self.trial = Trial(False)
            warnings.warn(f"looking ahead is off for this run: {type(error).__name__}: {error}"[:200], stacklevel=2)

    def end_layer(self) -> None:
        self.attended_ns = time.perf_counter_ns()

    def computed(self, seconds: float) -> None:
        """The model's own work between two layers' attention took so long."""

    def parts(self) -> list:
        """Open threads and files, in the order in which they are closed."""
        return [self.later, self.lookahead, self.writer, self.drive, self.lent]

    def stop(self) -> None:
        """Free the drive's space and end the threads; `start` may follow. A fork leaves its parent's alone."""
        self.owner.free()
        for part in self.parts():
            if part is not None and self.owner.here:
                part.close()
        self._forget()
