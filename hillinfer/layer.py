"""One decoder layer's cache: append, attend, crop, reset. Plain torch; knows no model."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from hillinfer import attention
from hillinfer.errors import UsageError
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.evaluator.policy import Policy, Step
from hillinfer.pipeline.lookahead import Guess
from hillinfer.run import Run
from hillinfer.systems.hillinfer.attending import AttendingStore
from hillinfer.systems.hillinfer.scoring import ScoringStore
from hillinfer.systems.leoam.packed import PackedStore
from hillinfer.systems.leoam.pages import Pages
from hillinfer.systems.lossless.store import TensorStore
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.store import DriveStore, Found, HostStore
from hillinfer.tiers.stream import Stream
from hillinfer.tiers.window import Window
from hillinfer.timeline import Hits

NEVER = np.iinfo(np.int32).min + 1  # the score of padding: below every real one


class Layer:
    """KV of one decoder layer over its tiers, and the attention of single query tokens over it."""

    def __init__(self, index: int, policy: Policy, run: Run):
        self.index, self.policy, self.run = index, policy, run
        self.store = self.codes = None
        self.guess: Guess | None = None  # what was prefetched for the coming step
        self.pieces: list[int] = []  # tokens of each append: codes depend on them a little

    @property
    def n(self) -> int:
        return self.store.n if self.store else 0

    @property
    def looks_ahead(self) -> bool:
        """Whether a guess would be of use: there is a drive to read from, and the policy can be asked twice."""
        return (
            isinstance(self.store, DriveStore)
            and self.policy.can_speculate
            and bool(self.run.trial.on)
            and self.run.turns.here
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        """Take in keys and values (B, Hkv, n, D); kv is both as records (B, n, 2, Hkv, D), where they are at hand."""
        run = self.run
        run.turns.take(self.index, keys.shape[2])
        if self.store is None:
            self._start(keys, values)
        run.note_dense(self.index, keys.shape[2])
        if self.index == 0:
            run.begin_step(keys.shape[2])
        run.check(self.n + keys.shape[2])
        if self.guess is not None:
            self.guess.chosen()  # the guess reads codes and pool; they may change from here on
        if keys.requires_grad or values.requires_grad:
            keys, values = keys.detach(), values.detach()  # what is cached is never trained through
        if kv is None:
            kv = torch.stack((keys.transpose(1, 2), values.transpose(1, 2)), 2)
        coded = None
        if self.codes is not None:
            with run.timeline.span("cpu", "encode", self.index, run.step, keys.nbytes):
                doublings = self.codes.append(keys)
                if isinstance(self.store, ScoringStore):
                    coded = self.codes.newest(keys.shape[2]), doublings
        if type(self.policy).append is not Policy.append:
            with run.timeline.span("cpu", "index", self.index, run.step, keys.nbytes):
                self.policy.append(keys)
        with run.timeline.span("cpu", "append", self.index, run.step, kv.nbytes):
            work = self.store.append(kv, coded)
        self._record(work)
        self.pieces.append(keys.shape[2])

    def records(self) -> Iterator[torch.Tensor]:
        """All records in order, (B, n, 2, Hkv, D) at a time."""
        for kv, found in self.store.parts() if isinstance(self.store, DriveStore) else [self.store.all()]:
            self._record(found.work)
            yield kv

    @property
    def in_parts(self) -> bool:
        """Whether a step of several query tokens gets the KV part by part."""
        return isinstance(self.store, DriveStore) and not self.policy.watches  # that one is shown all keys at once

    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, (B, Hkv, N, D)."""
        kv, found = self.store.all()
        self._record(found.work)
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attention of one query token (B, H, 1, D) over the selected tokens; of several tokens, exact over all.

        Returns (B, q, H, D). mask is None or broadcasts to (B, 1, q, N); False (or a large negative number) hides.
        """
        run, rows = self.run, query.shape[2]
        if rows > 1:
            return self._attend_all(query, mask, scaling)
        valid = self._valid(mask, len(query))
        if isinstance(self.store, AttendingStore):
            return self._attend_in_drive(query, valid, scaling)
        picks = self._select_rows(query, valid, scaling)
        if attention.is_native(query) and self._in_place(picks):
            rows, side, keep, attended, found = self._locate(picks, valid)
            self._record(found.work)
            start = time.perf_counter()
            with run.timeline.span("cpu", "attend", self.index, run.step, attended * run.geometry.record_bytes):
                out, _ = attention.over_records(query, rows, run.geometry.kv_heads, scaling, side)
            run.attend_s = time.perf_counter() - start
            del keep  # until here the records had to stay where they are
        else:
            kv, valid, found = self._gather(picks, valid)
            self._record(found.work)
            lane, start = "cpu" if query.device.type == "cpu" else "gpu", time.perf_counter()
            with run.timeline.span(lane, "attend", self.index, run.step, kv.nbytes):
                out = attention.over_tensors(query, kv, valid, scaling)
            run.attend_s = time.perf_counter() - start
            attended = kv.shape[1] * len(kv) if valid is None else int(valid.sum())
            self._show(query, kv, picks[0], self._valid(mask, len(query)), scaling)
            if self.policy.watches:
                self._tell_weights(query, picks, kv, valid, scaling)
        self._count(found, attended)
        run.attended_ns = time.perf_counter_ns()
        return out

    def _attend_in_drive(self, query: torch.Tensor, valid, scaling: float) -> torch.Tensor:
        """The drive attends to what it holds, the host to the rest; returns (B, 1, H, D)."""
        out, found = self.store.attend(query[:, :, 0], None if valid is None else valid.numpy(force=True), scaling)
        self._record(found.work)
        self._count(found, self.n * len(query) if valid is None else int(valid.sum()))
        self.run.attended_ns = time.perf_counter_ns()
        return out.to(query.dtype).unsqueeze(1)

    def _attend_all(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """A prefill chunk or a new turn, part by part, so that a layer's KV is never in memory as a whole."""
        rows, n = query.shape[2], self.n
        if mask is None:
            visible = torch.ones((1, 1, rows, n), dtype=torch.bool, device=query.device).tril_(n - rows)
        else:
            visible = attention.attendable(mask)
        return attention.over_parts(query, self.records(), visible, scaling).transpose(1, 2)

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
        """Show the policy a pass of several tokens: queries (B, H, q, D) over all keys (B, Hkv, n, D)."""
        visible = None if mask is None else mask[:, :, -1:]  # what the newest query sees: all but padding
        with self.run.timeline.span("cpu", "observe", self.index, self.run.step, queries.nbytes):
            self.policy.observe(queries.detach(), keys.detach(), self._valid(visible, len(queries)), scaling)

    def take_over(self, policy: Policy) -> None:
        """Go on with another policy, which is given all keys there are."""
        self.policy = policy
        if self.store is not None:
            self._start_policy(self.run.geometry)
            policy.append(self.everything()[0])

    def _in_place(self, picks: list) -> bool:
        """Whether records can be attended to where they lie: nobody wants to see them, and they need not be picked out
        of whole tensors.
        """
        watcher = self.run.observer
        watched = self.policy.watches or (watcher is not None and watcher.wants(self.index, self.run.step))
        return not watched and (not isinstance(self.store, TensorStore) or all(pick is None for pick in picks))

    def _show(self, query: torch.Tensor, kv: torch.Tensor, pick, visible, scaling: float) -> None:
        """Let whoever watches the run see the first sequence's attention. What that costs is a span of its own."""
        run, watcher = self.run, self.run.observer
        if watcher is None or not watcher.wants(self.index, run.step):
            return
        with run.timeline.span("cpu", "observe", self.index, run.step):
            shown = None if visible is None else visible[0]
            all_keys = lambda: self.store.all()[0][0, :, 0]  # noqa: E731
            watcher.take(self.index, run.step, query[0, :, 0], kv[0, :, 0], pick, self.n, scaling, shown, all_keys)

    def speculate(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
        """Score and prefetch for the coming step with a predicted query (B, H, 1, D), in the background.

        Only a prefetch: `attend` selects anew with the true query, takes what is here and reads what is not, so that
        output does not depend on the guess (HillInfer APP, section 1.4).
        """
        valid, share = self._valid(mask, len(query)), float(self.run.trial.on)

        def choose() -> list[np.ndarray]:
            picks = self._select_rows(query, valid, scaling, "guess", share)
            everything = np.arange(self.n)
            return [self.store.missing(row, everything if p is None else p) for row, p in enumerate(picks)]

        def read(missing: list[np.ndarray]) -> list[tuple[torch.Tensor, np.ndarray | None]]:
            parts = []
            for row, positions in enumerate(missing):
                start = time.perf_counter_ns()
                records, rows, nbytes = self.store.read(row, positions)
                self._record([("drive", "prefetch", start, time.perf_counter_ns(), nbytes)] if nbytes else [])
                parts.append((records, rows))
            return parts

        self.guess = self.run.lookahead.submit(choose, read)

    def crop(self, n: int) -> None:
        """Forget all tokens from n on."""
        self.run.turns.check()
        if self.guess is not None:
            self.guess.chosen()  # it reads what is about to change
            self.guess = None
        if self.store is not None and n < self.n:
            self.store.truncate(n)
            while sum(self.pieces) > n:
                self.pieces[-1] = max(0, self.pieces[-1] - sum(self.pieces) + n)
                if not self.pieces[-1]:
                    self.pieces.pop()
            self.policy.truncate(n)
            if self.codes is not None:
                self.codes.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        """Take these sequences of the batch, in this order."""
        if isinstance(self.store, DriveStore | TensorStore):
            raise UsageError(
                "beam search would copy whole caches on the drive: use num_beams=1, or keep the KV in memory (no drive)"
            )
        if self.store is not None:
            self.store.reorder(rows)
            self.policy.reorder(rows)
            if self.codes is not None:
                self.codes.reorder(rows)

    def reset(self) -> None:
        self.store = self.codes = self.guess = None
        self.pieces = []

    def memory(self) -> dict[str, int]:
        """Bytes held by kind: device and host KV records; key codes and the policy's index."""
        if self.store is None:
            return {}
        codes = 0 if self.codes is None else self.codes.nbytes
        return self.store.memory() | {"codes": codes + self.policy.nbytes}

    def _start(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        batch, kv_heads, _, dim = keys.shape
        if values.shape != keys.shape:
            raise UsageError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ: this attention is not supported"
            )
        run, settings = self.run, self.run.settings
        geometry = Geometry(batch, kv_heads, dim, keys.dtype, keys.device)
        run.start(geometry, keys.shape[2])
        if run.tensors is not None:
            self.store = TensorStore(run.tensors, self.index)
        elif run.drive is None:
            self.store = HostStore(geometry, resident=settings.host_budget is None)
        else:
            window = Window(geometry, settings.sinks, settings.recent)
            streams = [run.stream(self.index * batch + row) for row in range(batch)]
            parts = geometry, streams, run.ranking(), window, settings.pin, run.pool_tokens
            if run.packed is not None:
                packed = [Stream(run.packed, stream.index, run.writer) for stream in streams]
                self.store = PackedStore(*parts, compression=run.compression, packed=packed)
            elif settings.drive_kind == "ssd":
                self.store = DriveStore(*parts)
            else:
                self.store = (AttendingStore if run.in_drive else ScoringStore)(*parts)
        if self.policy.needs_codes or (isinstance(self.store, ScoringStore) and not run.in_drive):
            self.codes = KeyCodes(batch, kv_heads, dim, settings.bits)
        self._start_policy(geometry)

    def _start_policy(self, geometry: Geometry) -> None:
        def pages(row: int, shape: tuple) -> Pages:
            return self.run.pages(shape, self.index * geometry.batch + row)

        self.policy.start(geometry.batch, geometry.kv_heads, geometry.head_dim, pages)

    def _valid(self, mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """Which cached tokens may be attended to, (B, n) bool, or None for all."""
        if mask is None:
            return None
        return attention.attendable(mask)[:, 0, 0, : self.n].expand(batch, self.n)

    def _select_rows(
        self, query: torch.Tensor, valid, scaling: float, kind: str = "select", share: float = 1.0
    ) -> list[np.ndarray | None]:
        """Each row's selection, of this share of the budget; query (B, H, 1, D), valid (B, n) or None."""
        if not self.policy.selects:
            return [None] * query.shape[0]
        valid = None if valid is None else valid.cpu().numpy()
        return [
            self._select(query[row, :, 0], scaling, row, None if valid is None else valid[row], kind, share)
            for row in range(len(query))
        ]

    def _select(self, query: torch.Tensor, scaling: float, row: int, valid, kind: str, share: float):
        """query (H, D) -> sorted positions (k,), or None for all."""
        run, settings, n = self.run, self.run.settings, self.n

        def scores() -> np.ndarray:
            coded = self.codes.query(query, row)
            if isinstance(self.store, ScoringStore):
                result, work = self.store.scores(row, coded, lambda hot: self.codes.scores(coded, row, hot))
                self._record(work)
            else:
                scanned = n * run.geometry.kv_heads * run.geometry.head_dim * settings.bits // 8
                with run.timeline.span("cpu", "score", self.index, run.step, scanned):
                    result = self.codes.scores(coded, row)
            if valid is not None:
                result[:, ~valid] = NEVER
            return result

        def weights() -> np.ndarray:
            kv, found = self.store.all()
            self._record(found.work)
            return attention.attention_weights(query, kv[row, :, 0], scaling, valid, np.arange(n))

        budget = min(n, max(int(share * settings.budget(n)), settings.sinks + settings.recent))
        sizes = n, budget, settings.sinks, settings.recent, self.index, run.step
        step = Step(*sizes, scores, weights, query, scaling, row, valid, guess=kind == "guess")
        with run.timeline.span("cpu", kind, self.index, run.step) as detail:
            picked = self.policy.select(step)
            detail |= step.notes
        self._record(step.work)
        if picked is not None and not _is_selection(picked, step):
            raise UsageError(
                f"{type(self.policy).__name__}.select must return at most {step.budget} sorted, distinct positions <{n}"
            )
        return picked

    def _tell_weights(self, query, picks: list, kv: torch.Tensor, valid, scaling: float) -> None:
        """Tell the policy what the attention to kv (B, k, 2, Hkv, D) weighed, for each row its own."""
        keys = kv[:, :, 0].permute(0, 2, 3, 1).float()  # (B, Hkv, D, k)
        logits = query.float().view(len(kv), keys.shape[1], -1, keys.shape[2]) * scaling @ keys
        if valid is not None:
            logits.masked_fill_(~valid[:, None, None].to(logits.device), -torch.inf)
        weights = logits.softmax(-1).flatten(1, 2).numpy(force=True)
        for row, pick in enumerate(picks):
            pick = np.arange(self.n) if pick is None else pick
            self.policy.attended(row, pick, weights[row, :, : len(pick)])

    def _gather(self, picks: list, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, Found]:
        """Each row's selection as tensors; rows of different length are padded and masked. kv (B, k, 2, Hkv, D), valid
        (B, k).
        """
        if all(pick is None for pick in picks):
            kv, found = self.store.all()
            return kv, valid, found
        picks, rows, found = self._by_row(picks, self.store.fetch)
        if valid is None and len({len(pick) for pick in picks}) == 1:
            return torch.stack([records for records, _ in rows]) if len(rows) > 1 else rows[0][0][None], None, found
        longest = max(len(pick) for pick in picks)
        kv = rows[0][0].new_zeros((len(rows), longest, *rows[0][0].shape[1:]))
        shown = torch.zeros((len(rows), longest), dtype=torch.bool, device=kv.device)
        for row, (pick, (records, _)) in enumerate(zip(picks, rows, strict=True)):
            kv[row, : len(pick)] = records
            shown[row, : len(pick)] = True if valid is None else valid[row][torch.from_numpy(pick).to(valid.device)]
        return kv, shown, found

    def _locate(self, picks: list, valid: torch.Tensor | None) -> tuple[list, int | None, list, int, Found]:
        """Where each row's selection lies in host memory: `native.attend`'s rows and side, what must be kept alive for
        it, the tokens in all, and where they were found.
        """
        shown = None if valid is None else valid.numpy()
        if all(pick is None for pick in picks):
            kv, found = self.store.all()
            each, width, side = (stride * kv.element_size() for stride in kv.stride()[:3])
            rows = [(kv.data_ptr() + row * each, width, self.n) for row in range(kv.shape[0])]
            if shown is not None:
                rows = [base + np.flatnonzero(own) * width for (base, _, _), own in zip(rows, shown, strict=True)]
            return rows, side, [kv], self.n * len(rows) if shown is None else int(shown.sum()), found
        picks, parts, found = self._by_row(picks, self.store.locate)
        rows, keep = [addresses for (addresses, _), _ in parts], [kept for (_, kept), _ in parts]
        if shown is not None:
            rows = [where[own[pick]] for where, own, pick in zip(rows, shown, picks, strict=True)]
        return rows, None, keep, sum(map(len, rows)), found

    def _by_row(self, picks: list, get: Callable) -> tuple[list[np.ndarray], list[tuple], Found]:
        """Each row's selection in full, what `get` has of it, and where it was found."""
        picks = [np.arange(self.n) if pick is None else pick for pick in picks]
        guess, self.guess = self.guess, None
        ahead = [None] * len(picks) if guess is None else guess.rows(len(picks))
        rows = [get(row, pick, ahead[row]) for row, pick in enumerate(picks)]
        if isinstance(self.store, DriveStore):
            for row, pick in enumerate(picks):
                self.store.hits.touch(row, pick)
        return picks, rows, rows[0][1] if len(rows) == 1 else sum((part for _, part in rows), Found())

    def _record(self, work: list[tuple[str, str, int, int, int]]) -> None:
        for lane, kind, start, end, nbytes in work:
            self.run.timeline.add(lane, kind, self.index, self.run.step, start, end, nbytes)

    def _count(self, found: Found, attended: int) -> None:
        run, start = self.run, time.perf_counter_ns()
        swapped = self.store.settle()
        if swapped:
            run.timeline.add(
                "cpu", "swap", self.index, run.step, start, time.perf_counter_ns(), swapped * run.geometry.record_bytes
            )
        queries, counts = found.device + found.host + found.drive, found.counts()
        run.counters.rows.append(Hits(run.step, self.index, self.n, queries, attended, *counts, swapped))


def _is_selection(picked: np.ndarray, step: Step) -> bool:
    if not isinstance(picked, np.ndarray) or picked.ndim != 1 or not 0 < len(picked) <= step.budget:
        return False
    return bool(picked[0] >= 0 and picked[-1] < step.n and (picked[1:] > picked[:-1]).all())
