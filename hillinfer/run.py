"""What the layers of one cache share: settings, the record of the run, the drive and the hit table."""

import math
import time
from dataclasses import dataclass, field, replace

from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.native import ring
from hillinfer.pipeline.lookahead import AHEAD, Lookahead, Trial
from hillinfer.pipeline.memory import FIX, needs, refuse
from hillinfer.pipeline.ownership import Turns
from hillinfer.pipeline.pool_size import pool_tokens
from hillinfer.systems.hardware.card import Xrt
from hillinfer.systems.hardware.xrt import XrtDrive
from hillinfer.systems.hillinfer import cec
from hillinfer.systems.hillinfer.balance import SelectionRates, Speeds
from hillinfer.systems.hillinfer.drive import SMARTSSD, Shape
from hillinfer.systems.hillinfer.emulated import EmulatedDrive, Emulation
from hillinfer.systems.hillinfer.profile import load_speeds
from hillinfer.systems.hillinfer.scoring import RemoteStream
from hillinfer.systems.leoam.compression import Compression
from hillinfer.systems.leoam.packed import packed_geometry
from hillinfer.systems.leoam.pages import Pages
from hillinfer.systems.lossless.run import open_tensors, staggering, tell_tensors
from hillinfer.systems.lossless.tensors import Tensors
from hillinfer.tiers.drive import DirectDrive
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import PLACEMENTS, SharedHits
from hillinfer.tiers.stream import BEHIND, Stream, Writer
from hillinfer.timeline import Counters, Timeline
from hillinfer.workbench.observe import AttentionRecord

CORRECT = 16  # decode steps after which the split is corrected by what they selected


@dataclass
class Run:
    """The shared state of a cache. `start` makes it from the shape of the first keys, `stop` gives it back."""

    settings: Settings
    layers: int
    timeline: Timeline = field(default_factory=Timeline)
    counters: Counters = field(default_factory=Counters)
    step: int = -1
    attend_s: float = 0.0  # what the last attention took
    attended_ns: int | None = None  # when a layer's attention last ended in a decode step
    geometry: Geometry | None = None
    drive: DirectDrive | EmulatedDrive | XrtDrive | None = None
    hits: SharedHits | None = None
    writer: Writer | None = None
    lookahead: Lookahead | None = None
    speeds: Speeds | None = None  # of the profile
    chosen: SelectionRates | None = None  # what the last steps selected from either side
    in_drive: bool = False  # whether the drive attends to what it holds
    packed: DirectDrive | None = None  # the records in INT4
    compression: Compression = field(default_factory=Compression)
    paged: float = 0.0  # bytes for each key channel of a policy's index that lives in pages
    index_budget: int = 0  # bytes of the host budget that are for it
    trial: Trial | None = None  # whether it pays to look ahead; of a system that streams, to stagger its two threads
    tensors: Tensors | None = None  # of a system that streams
    observer: AttentionRecord | None = None  # who watches what is attended to

    turns: Turns = field(init=False)

    def __post_init__(self):
        self.turns = Turns(self.layers)
        if self.settings.engine == "io_uring" and (reason := ring.why_not()):
            raise UsageError(f"{reason} (engine io_uring was asked for; auto takes what there is)")

    def start(self, geometry: Geometry, tokens: int = 0) -> None:
        """Fix the shape at the first append, of `tokens` tokens, and open the drive if there is one. UsageError where
        there is not the memory for what they need.
        """
        if self.geometry is None:
            fits = needs(replace(self, geometry=geometry), None, max(tokens, self.settings.max_tokens or 0))
            refuse(fits, FIX)
            self.geometry = geometry
            if self.settings.stream is not None:
                self.trial = staggering(self.settings)
                self.tensors = open_tensors(self.settings, geometry, self.layers, lambda: self.trial.on)
            elif self.settings.drive is not None:
                self.index_budget = self._index_budget()
                if (kind := PLACEMENTS[self.settings.placement]).shared:
                    self.hits = kind(geometry.batch)
                if self.settings.profile is not None:
                    self.speeds = load_speeds(self.settings.profile, geometry.record_bytes)
                self.drive = self._open_drive(geometry)
                if self.settings.compress and self.settings.drive_kind == "ssd":
                    own, streams = packed_geometry(geometry), self.layers * geometry.batch
                    self.packed = DirectDrive(
                        self.settings.drive, own, streams, self.settings.io_threads, **self._safety
                    )
                    self.compression = Compression(self.settings.compress)
                self.lookahead, self.trial = Lookahead(), Trial(self.settings.lookahead, AHEAD)
                budget = self.settings.host_budget
                self.writer = Writer() if budget is None else Writer(min(BEHIND, budget // 4))
        elif self.geometry != geometry:
            raise UsageError(
                f"layers of different shapes or batches ({self.geometry} and {geometry}) cannot share a drive file"
            )

    @property
    def records_budget(self) -> int | None:
        """Bytes of the host budget that are for KV records."""
        budget = self.settings.host_budget
        return None if budget is None else budget - self.index_budget

    def _index_budget(self) -> int:
        """Bytes for an index in pages: a quarter of the budget; given the longest context to come, all of the index, as
        each step searches it whole, where the pinned records leave that much. Both with a quarter to spare. The first
        append does not tell the length: it may be a chunk of a prompt, or a conversation's first turn.
        """
        budget, size, tokens = self.settings.host_budget, self.geometry, self.settings.max_tokens
        if not self.paged or budget is None:
            return 0
        if tokens is None:
            return budget // 4
        index = self.paged * size.kv_heads * size.head_dim * self.layers * size.batch
        pinned = self.settings.pin * self._bytes_per_token()
        return int(min(1.25 * tokens * index, max(budget / 4, budget - 1.25 * tokens * pinned)))

    def pool_tokens(self, n: int) -> int:
        """Hot pool size in tokens, for each layer and sequence, at n cached tokens (`pool_size.pool_tokens`)."""
        if self.in_drive:
            return 0
        share = None if self.speeds is None else self._balanced_share()
        return pool_tokens(self.settings, n, self._bytes_per_token(), self.records_budget, share)

    def why_split(self) -> str:
        """The pool's size and its reason, in one line."""
        alpha, budget = self.settings.alpha, self.settings.host_budget
        if self.tensors is not None:
            return tell_tensors(self.tensors, self.trial)
        if self.drive is None:
            return "all KV in memory: no drive was named"
        if self.speeds is not None:
            text = f"host holds {self._balanced_share():.0%}: "
            if self.settings.split == "paper":
                text += "by the profile host and drive then take equally long"
            else:
                chosen, source = self._chosen(), "as in the last steps" if self.chosen else "alpha, for lack of steps"
                text += "by the profile a step is then shortest, where "
                text += f"{chosen.host:.0%} of the pool and {chosen.drive:.0%} of the rest are selected ({source})"
        elif budget is None:
            text = f"host holds 2*alpha = {2 * alpha:.0%}: {self.settings.pin:.0%} pinned by age, the rest by hits; no "
            text += "profile was given"
        else:
            text = "host holds what the budget allows; no profile was given"
        text = text if budget is None else f"{text}, at most {budget:,} bytes"
        if self.settings.drive_kind == "emulated":
            kernel = cec.choose(self.settings.bits, self.geometry.head_dim)
            text += (
                f"; the drive's modelled scoring is that of {kernel.name} at {cec.CLOCK / 1e6:.0f} MHz (assumed clock)"
            )
        return text

    def _balanced_share(self) -> float:
        """The host's share of the tokens by the profile, for the shortest step or by the paper's closed form."""
        settings, geometry = self.settings, self.geometry
        code_bytes = geometry.kv_heads * geometry.head_dim * settings.bits // 8
        return self.speeds.split(settings.split, self._chosen(), settings.alpha, code_bytes, geometry.record_bytes)

    def _chosen(self) -> SelectionRates:
        return self.chosen or SelectionRates(self.settings.alpha, self.settings.alpha)

    def _correct(self) -> None:
        """Hot tokens are selected more often than alpha, cold ones less: balance by what the last steps selected."""
        rows = self.counters.rows[-CORRECT * self.layers :]
        pool = sum(min(self.pool_tokens(row.cached), row.cached) for row in rows) * self.geometry.batch
        rest = sum(row.cached for row in rows) * self.geometry.batch - pool
        if min(pool, rest) > 0:  # of a side that holds nothing nothing is known
            host, drive = sum(row.host for row in rows), sum(row.drive for row in rows)
            self.chosen = SelectionRates(host / pool, drive / rest)

    def _open_drive(self, geometry: Geometry) -> DirectDrive | EmulatedDrive | XrtDrive:
        settings, streams, safety = self.settings, self.layers * geometry.batch, self._safety
        if settings.drive_kind == "ssd":
            return DirectDrive(settings.drive, geometry, streams, settings.io_threads, settings.engine, **safety)
        coded = 0 if self.in_drive else geometry.head_dim
        shape = Shape(streams, geometry.batch, geometry.record_bytes, geometry.kv_heads, coded)
        if settings.drive_kind == "xrt":
            own = Xrt(xclbin=settings.xclbin, bits=settings.bits, threads=settings.io_threads, **safety)
            return XrtDrive(settings.drive, shape, own)
        kernel = cec.choose(settings.bits, geometry.head_dim)
        rates = replace(SMARTSSD, kernel=kernel.code_rate(geometry.head_dim), call=kernel.call_seconds)
        how = dict(paced=settings.paced, threads=settings.io_threads, engine=settings.engine)
        own = Emulation(rates=rates, **how, **safety)
        return EmulatedDrive(settings.drive, shape, own)

    @property
    def _safety(self) -> dict:
        return dict(checksums=self.settings.checksums, timeout=self.settings.timeout)

    def stream(self, index: int) -> Stream | RemoteStream:
        """Stream layer * batch + row of the drive."""
        if self.settings.drive_kind == "ssd":
            return Stream(self.drive, index, self.writer)
        return RemoteStream(self.drive, self.geometry, index)

    def pages(self, shape: tuple, stream: int) -> Pages:
        """Where a policy keeps its index: on an ssd's file, and in memory what `index_budget` holds."""
        budget, streams = self.settings.host_budget, self.layers * self.geometry.batch
        if not isinstance(self.drive, DirectDrive):
            return Pages(shape)
        held = None if budget is None else self.index_budget // (streams * math.prod(shape))
        return Pages(shape, self.drive, stream, held)

    def ranking(self) -> SharedHits:
        """What one layer's pool ranks by: the table that all share, or one of its own."""
        return self.hits or PLACEMENTS[self.settings.placement](self.geometry.batch)

    def check(self, n: int) -> None:
        """UsageError where n tokens cannot be held within the budget."""
        budget, pin = self.records_budget, self.settings.pin
        if budget is None or self.in_drive or self.settings.stream is not None:
            return
        held = n if self.settings.drive is None else math.ceil(pin * n)
        need = held * self._bytes_per_token()
        if need <= budget:
            return
        if self.settings.drive is None:
            raise UsageError(
                f"{n} tokens of KV take {need:,} bytes but the host budget for them is {budget:,}: "
                "name a drive folder for the rest, or raise the budget"
            )
        raise UsageError(
            f"the newest {pin:.0%} = {held} of {n} tokens are pinned in host memory and take {need:,} bytes, "
            f"but the host budget for them is {budget:,}: raise it to that, or lower alpha or pinned"
        )

    def _bytes_per_token(self) -> int:
        return self.layers * self.geometry.batch * self.geometry.record_bytes

    def note_dense(self, layer: int, tokens: int) -> None:
        """What lies between one layer's attention and the next one's keys is the model's own work: record it."""
        if self.attended_ns is not None and tokens == 1:
            lane = "cpu" if self.geometry.device.type == "cpu" else "gpu"
            now = time.perf_counter_ns()
            self.timeline.add(lane, "dense", layer, self.step, self.attended_ns, now)
            self.compression.note("compute", (now - self.attended_ns) / 1e9 + self.attend_s)
        self.attended_ns = None

    def begin_step(self, tokens: int) -> None:
        """The first layer takes in `tokens` new tokens of each sequence."""
        self.step += 1
        if self.speeds is not None and tokens == 1 and self.step % CORRECT == 0:
            self._correct()
        if self.trial is not None:
            if tokens == 1:
                self.trial.step(time.perf_counter())
            else:
                self.trial.pause()
        if self.hits is not None:
            self.hits.age()

    def stop(self) -> None:
        """Give back the drive's space and the threads; `start` may follow. In a forked process they are not ours."""
        self.turns.free()
        for part in (
            self.lookahead,
            self.writer,
            self.packed,
            self.drive,
            self.tensors,
        ):
            if part is not None and self.turns.here:
                part.close()
        self.geometry = self.drive = self.packed = self.hits = self.writer = self.lookahead = self.trial = None
        self.tensors = self.chosen = None
