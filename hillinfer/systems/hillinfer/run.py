"""Runs on a computational drive that scores keys (HillInfer) or computes attention (InstAttention)."""

from dataclasses import replace

from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.pipeline.pool_size import pool_tokens
from hillinfer.run import Run
from hillinfer.systems.hillinfer import cec
from hillinfer.systems.hillinfer.attending import AttendingStore
from hillinfer.systems.hillinfer.balance import SelectionRates, Speeds
from hillinfer.systems.hillinfer.card import Xrt, check_card
from hillinfer.systems.hillinfer.drive import ComputationalDrive, EmulatedDrive
from hillinfer.systems.hillinfer.profile import Profile
from hillinfer.systems.hillinfer.protocol import SMARTSSD, Emulation, Shape
from hillinfer.systems.hillinfer.scoring import DriveLog, ScoringStore
from hillinfer.systems.hillinfer.xrt import XrtDrive
from hillinfer.tiers.block_file import BLOCK
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import BEHIND
from hillinfer.tiers.tiered_store import TieredStore
from hillinfer.timeline import Track

REBALANCE_EVERY = 16  # decode steps between corrections of the split by the measured selection rates


class ScoringRun(Run):
    """With a device profile, the host's pool is sized for the shortest step (`Speeds.split`)."""

    store: type[TieredStore] = ScoringStore

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        super().check_settings(settings)
        if settings.bits == 2 and cls.store.scores_keys:
            raise UsageError("a drive scores int8 and int4 key codes only: choose one with --precision, or an ssd")
        if settings.profile is not None:
            Profile.load(settings.profile).speeds(BLOCK)  # raises if it cannot be used, at any size
        if settings.drive_kind == "xrt":
            check_card(settings.xclbin)

    def _forget(self) -> None:
        super()._forget()
        self.speeds: Speeds | None = None  # of the profile
        self.chosen: SelectionRates | None = None  # of the last steps

    def open_drive(self, geometry: Geometry) -> ComputationalDrive:
        settings, streams = self.settings, self.layers * geometry.batch
        if settings.profile is not None:
            self.speeds = Profile.load(settings.profile).speeds(geometry.record_bytes)
        coded = geometry.head_dim if self.store.scores_keys else 0
        shape = Shape(streams, geometry.batch, geometry.record_bytes, geometry.kv_heads, coded)
        if settings.drive_kind == "xrt":
            card = Xrt(xclbin=settings.xclbin, bits=settings.bits, **self.io)
            return XrtDrive(settings.drive, shape, card)
        kernel = self._kernel(geometry)
        rates = replace(SMARTSSD, kernel=kernel.code_rate(geometry.head_dim), call=kernel.call_seconds)
        return EmulatedDrive(settings.drive, shape, Emulation(rates=rates, paced=settings.paced, **self.io))

    def _kernel(self, geometry: Geometry) -> cec.Configuration:
        """The drive's; a drive that attends has no use for it."""
        return cec.choose(self.settings.bits if self.store.scores_keys else 8, geometry.head_dim)

    def open_store(self, track: Track) -> TieredStore:
        return self.tiered_store(self.store, track, lambda stream: DriveLog(self.drive, self.geometry, stream))

    def host_bytes(self, tokens: int) -> dict[str, int]:
        parts = super().host_bytes(tokens)
        if self.settings.drive_kind == "emulated":
            queued = 2 * min(BEHIND, tokens * self.token_bytes)
            parts["the emulated drive"] = self.code_bytes(tokens) + queued
        return parts

    def pool_tokens(self, n: int) -> int:
        share = None if self.speeds is None else self._balanced_share()
        return pool_tokens(self.settings, n, self.token_bytes, self.records_budget, share)

    def _balanced_share(self) -> float:
        """The host's share of the tokens by the profile, for the shortest step or by the paper's closed form."""
        settings, size = self.settings, self.geometry
        code_bytes = size.kv_heads * size.head_dim * settings.bits // 8
        return self.speeds.split(settings.split, self._chosen(), settings.alpha, code_bytes, size.record_bytes)

    def _chosen(self) -> SelectionRates:
        return self.chosen or SelectionRates(self.settings.alpha, self.settings.alpha)

    def begin_step(self, tokens: int) -> None:
        if self.speeds is not None and tokens == 1 and self.timeline.step % REBALANCE_EVERY == 0:
            self._rebalance()
        super().begin_step(tokens)

    def _rebalance(self) -> None:
        """Rebalance by the selection rates of the last steps: above alpha for hot tokens, below it for cold ones."""
        rows, batch = self.counters.rows[-REBALANCE_EVERY * self.layers :], self.geometry.batch
        pool = sum(min(self.pool_tokens(row.cached), row.cached) for row in rows) * batch
        rest = sum(row.cached for row in rows) * batch - pool
        if min(pool, rest) > 0:  # nothing is known of an empty side
            host, drive = sum(row.host for row in rows), sum(row.drive for row in rows)
            self.chosen = SelectionRates(host / pool, drive / rest)

    def why_split(self) -> str:
        text, budget = super().why_split(), self.settings.host_budget
        if self.drive is None:
            return text
        if self.speeds is not None:
            chosen, source = self._chosen(), "as in the last steps" if self.chosen else "alpha before the first steps"
            why = f"shortest step by the profile if {chosen.host:.0%} of the pool and {chosen.drive:.0%} of the rest "
            why += f"are selected ({source})"
            if self.settings.split == "paper":
                why = "equal time for host and drive by the profile"
            text = f"host holds {self._balanced_share():.0%}: {why}"
            text += "" if budget is None else f", at most {budget:,} bytes"
        if self.settings.drive_kind == "emulated":
            kernel, clock = self._kernel(self.geometry), cec.CLOCK / 1e6
            text += f"; the drive's modelled scoring is that of {kernel.name} at {clock:.0f} MHz (assumed clock)"
        return text


class AttendingRun(ScoringRun):
    """InstAttention: the drive attends to all tokens outside the window, and the host has no pool."""

    store = AttendingStore

    def pool_tokens(self, n: int) -> int:
        return 0

    def check(self, n: int) -> None:
        """Any length fits: the host holds no records."""
