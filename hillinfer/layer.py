"""One decoder layer's cache: append, select, attend, crop, reset. Plain torch; knows no model and no store by name."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hillinfer import attention
from hillinfer.errors import DriveError, UsageError
from hillinfer.evaluator.codes import NEVER
from hillinfer.evaluator.policy import Policy, Step, each_row, of_row
from hillinfer.evaluator.ranks import head_ranks
from hillinfer.evaluator.segments import KeyCodes, SegmentCodes, open_codes
from hillinfer.run import Run
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.store import Store
from hillinfer.timeline import Track


class Layer:
    """KV of one decoder layer over its tiers, and the attention of single query tokens over it."""

    def __init__(self, index: int, policy: Policy, run: Run):
        self.index, self.policy, self.run = index, policy, run
        self.track = Track(run.timeline, run.counters, index)
        self.store: Store | None = None
        self.codes: KeyCodes | SegmentCodes | None = None
        self.guess: Future | None = None  # the selection for the coming step, being made
        self.pieces: list[int] = []  # tokens of each append: codes depend on them a little
        self.dims = (0, 0)  # channels of a key and of a value; the narrower is padded to a record's two equal halves
        self.softcap = 0.0  # of the model's logits; 0 if it has none
        self.open_codes, self.seen = open_codes, None  # a GPU has its own codes, and makes its own view of the store

    @property
    def n(self) -> int:
        return self.store.n if self.store else 0

    @property
    def looks_ahead(self) -> bool:
        """True if a guess would be of use: the store reads from a drive, and the policy can be asked twice."""
        able = self.store and self.store.can_prefetch and self.policy.can_speculate
        return bool(able and self.run.trial.on and self.run.owner.here)

    @property
    def in_parts(self) -> bool:
        """True if a step of several tokens gets the KV part by part, never a drive's as a whole; not on a GPU, whose
        own attention is faster, nor for a policy that watches and sees all keys at once.
        """
        near = self.store.geometry.device.type == "cpu" and not self.track.away
        return (near or self.store.can_prefetch) and not self.policy.watches

    @property
    def chooses(self) -> bool:
        """True if the policy is asked for tensors; on a GPU nothing of the selection is in host memory then."""
        coded = not self.policy.needs_codes or isinstance(self.codes, KeyCodes)
        there = not self.policy.selects or (self.policy.there and coded)
        return there if self.store.lane == "gpu" else not self.policy.here

    def to(self, *_) -> "Layer":
        """Itself, in place of the keys that early Gemma 3n moves."""
        return self

    def append(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        """Add keys (B, Hkv, n, D) and values, whose D may differ; kv is both as records, if they exist already."""
        run, new, dims = self.run, keys.shape[2], (keys.shape[3], values.shape[3])
        keys, values = (attention.padded(part, max(dims)) for part in (keys, values))
        geometry = Geometry(len(keys), *keys.shape[1::2], keys.dtype, keys.device)
        held = self.store.geometry if self.store else geometry
        if geometry != held or keys.shape != values.shape:
            raise UsageError(
                f"this cache holds {held.batch} sequences of {held.kv_heads} KV heads x {held.head_dim}, {held.dtype}, "
                f"and was given keys {tuple(keys.shape)} and values {tuple(values.shape)}, {keys.dtype}: "
                "use a new cache for another batch or model"
            )
        run.owner.take(self.index)
        if self.store is None:
            self.dims = dims
            self._start(geometry, new)
        run.begin_layer(self.track, new)
        run.check(self.n + new)
        self._finish_guess()  # it reads codes and pool, which change from here on
        if kv is None:  # never trained through
            kv = torch.stack((keys.transpose(1, 2), values.transpose(1, 2)), 2).detach()
        codes, lane = None, self.store.lane if self.chooses else "cpu"
        if self.codes is not None:
            with self.track.span(lane, "encode", keys.nbytes):
                doublings = self.codes.append(keys.detach())
                if self.store.scores_keys:
                    codes = self.codes.newest(new), doublings
        if type(self.policy).append is not Policy.append:
            with self.track.span(lane, "index", keys.nbytes):
                self.policy.append(keys.detach())
        with self.track.span(self.store.lane, "append", kv.nbytes):
            self.store.append(kv, codes)
        if run.keeper is not None:
            run.keeper.take(self.index, self.whole(kv))
        self.pieces.append(new)
        run.owner.entered = self.index

    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, (B, Hkv, N, D)."""
        kv = self.store.all()[0].permute(2, 0, 3, 1, 4)
        return attention.narrowed(kv[0], self.dims[0]), attention.narrowed(kv[1], self.dims[1])

    def read(self, step: bool) -> torch.Tensor:
        """A copy of all records, (B, N, 2, Hkv, D), for attention outside of here; a decode `step` is counted."""
        kv, served = self.store.all()
        kv = kv.clone()  # the store may reuse its buffers
        swapped = self.store.settle()
        if step:
            self.track.count(self.n, self.n * len(kv), served, swapped)
            self.run.end_layer()
        return kv

    def records(self) -> Iterator[torch.Tensor]:
        """All records in order, (B, n, 2, Hkv, D) at a time."""
        return map(self.whole, self.store.parts())

    def whole(self, kv: torch.Tensor) -> torch.Tensor:
        """Records of the store as those of a sequence, (B, n, 2, Hkv, D)."""
        return kv

    def attend(self, query: torch.Tensor, mask, scaling: float, softcap=0.0, sinks=None) -> torch.Tensor:
        """Attention of one query token (B, H, 1, D) over the selected tokens; of several tokens, exact over all.

        Returns (B, q, H, D). mask is None or broadcasts to (B, 1, q, N); False (or a large negative number) hides.

        softcap  see `attention.logits`; for one token only
        sinks    (H,), one more logit per head that has no value (gpt-oss); for one token only
        """
        query = attention.padded(query, self.store.geometry.head_dim)
        if query.shape[2] > 1:  # part by part, so that a layer's KV is never in memory as a whole
            out = attention.over_parts(query, self.store.parts(), mask, scaling, self.n).transpose(1, 2)
            return attention.narrowed(out, self.dims[1]).contiguous()
        self.softcap, valid = softcap, self._valid(mask, len(query))
        picks = self.select(query, valid, scaling)
        self._finish_guess()
        watch = self._watch(query, picks, valid, scaling)
        out, lse = self.store.attend(query, picks, valid, scaling, watch, softcap, sinks is not None)
        if sinks is not None:  # the sink's share of the softmax leaves the others exp(lse) / (exp(lse) + exp(sink))
            out = (out * torch.sigmoid(lse - sinks.float())[:, None, :, None]).to(query.dtype)
        self.run.end_layer()
        return attention.narrowed(out, self.dims[1])

    def observe(self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> None:
        """Show the policy a pass of several tokens: queries (B, H, q, D) over all keys (B, Hkv, n, D)."""
        visible = None if mask is None else mask[:, :, -1:]  # the newest query sees all but padding
        with self.track.span("cpu", "observe", queries.nbytes):
            queries, keys = (attention.padded(part.detach(), max(self.dims)) for part in (queries, keys))
            self.policy.observe(queries, keys, self._valid(visible, len(queries)), scaling)

    def select(self, query: torch.Tensor, valid, scaling: float, kind="select", share=1.0) -> list | tuple:
        """Each sequence's sorted positions (k,), or None for all tokens, for a query (B, H, 1, D), predicted if
        the kind is "guess", within a share of the budget. On a GPU what `Policy.choose` returned.
        """
        settings, n, picks = self.run.settings, self.n, []
        budget = min(n, max(int(share * settings.budget(n)), settings.sinks + settings.recent))
        if not self.policy.selects or (self.policy.fills and budget == n):
            return [None] * len(query)
        sizes = n, budget, settings.sinks, settings.recent, self.index, self.run.timeline.step
        if self.chooses:
            ranks = None if self.codes is None else partial(self.codes.ranks, query[:, :, 0], scaling, valid)
            step = Step(*sizes, ranks, None, query[:, :, 0], scaling, valid=valid, guess=kind == "guess")
            with self.track.span(self.store.lane, kind) as detail:
                chosen = self.policy.choose(step)
                detail |= step.notes
            if chosen is None or self.store.lane == "gpu":
                return chosen or [None] * len(query)
            return each_row(*chosen)
        if self.policy.needs_codes or type(self.policy).append is not Policy.append:
            query = query.cpu()  # once
        for row in range(len(query)):
            own, visible = query[row, :, 0], None if valid is None else valid[row].numpy()
            asked = (partial(which, own, row, visible, scaling) for which in (self._scores, self._weights))
            step = Step(*sizes, *asked, own, scaling, row, visible, guess=kind == "guess")
            with self.track.span("cpu", kind) as detail:
                picked = self.policy.select(step)
                detail |= step.notes
            if not step.accepts(picked):
                name = type(self.policy).__name__
                raise UsageError(f"{name}.select must return at most {budget} sorted, distinct positions <{n}")
            picks.append(picked)
        return picks

    def _scores(self, query: torch.Tensor, row: int, valid: np.ndarray | None, scaling: float) -> np.ndarray:
        """Ranks of all keys by their codes, int32 (n,), wherever these are scored. query (H, D)."""
        size, (coded, unit) = self.run.geometry, self.codes.query(query, row)
        scanned = self.n * size.kv_heads * size.head_dim * self.run.settings.bits // 8
        result = self.store.scores(row, coded, self.codes.scorer(coded, row), scanned)
        if valid is not None:
            result[:, ~valid] = NEVER
        return head_ranks(result, np.repeat(unit * np.float32(scaling), coded.shape[1]))

    def _weights(self, query: torch.Tensor, row: int, valid: np.ndarray | None, scaling: float) -> np.ndarray:
        """Exact attention weights of all keys, (H, n) float32."""
        return attention.attention_weights(query, self._keys(row), scaling, valid, self.softcap)

    def _keys(self, row: int) -> torch.Tensor:
        """All of a row's keys, (n, Hkv, D)."""
        return self.store.all()[0][row, :, 0]

    def speculate(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float, picks=None) -> None:
        """Select and prefetch for the coming step with a predicted query (B, H, 1, D), in the background; `picks` are
        what it has selected. Only a prefetch: `attend` selects again with the true query, uses the records that were
        prefetched and reads the others, so that the output does not depend on the guess (HillInfer APP, section 1.4).
        """
        query = attention.padded(query, self.store.geometry.head_dim)
        valid, share = self._valid(mask, len(query)), float(self.run.trial.on)

        def work() -> None:
            for row, pick in enumerate(picks or self.select(query, valid, scaling, "guess", share)):
                self.store.prefetch(row, np.arange(self.n) if pick is None else pick)

        self.guess = self.run.lookahead.submit(work)

    def _finish_guess(self) -> None:
        """Wait for the guess, if there is one. A guess that failed ends looking ahead, a drive that failed the run."""
        guess, self.guess = self.guess, None
        if guess is not None and (error := guess.exception()) is not None:
            if isinstance(error, DriveError) or not isinstance(error, Exception):
                raise error
            self.run.stop_guessing(error)

    def _watch(self, query: torch.Tensor, picks, valid: torch.Tensor | None, scaling: float):
        """A callback that shows the attended records to the observer and the policy; None if neither wants them."""
        observer, step = self.run.observer, self.track.timeline.step
        observed = observer is not None and observer.should_observe(self.index, step)
        told = type(self.policy).attended is not Policy.attended
        if not (observed or told):
            return None
        positions, counts = picks if isinstance(picks, tuple) else (picks, None)

        def watch(kv: torch.Tensor, shown: torch.Tensor | None) -> None:
            for row in range(self.run.heads if observed else 0):  # the first sequence; the cost is a span of its own
                with self.track.span("cpu", "observe"):
                    keys, pick = (of_row(part, row, counts) for part in (kv[:, :, 0], positions))
                    pick = pick.numpy(force=True) if torch.is_tensor(pick) else pick
                    seen = query[row, :, 0], keys, pick, self.n, scaling, None if valid is None else valid[row]
                    observer.observe(attention.Observed(self.index, step, *seen, partial(self._keys, row)))
            if told:
                logits = attention.logits(query, kv[:, :, 0], shown, scaling, self.softcap)
                picked = positions
                if isinstance(picks, list):
                    each = (np.arange(self.n) if pick is None else pick for pick in picks)
                    picked = pad_sequence([*map(torch.from_numpy, each)], True)
                self.policy.attended(picked, logits.softmax(-1).flatten(1, 2).to(self.policy.device))

        return watch

    def crop(self, n: int) -> None:
        """Forget all tokens from n on."""
        self.run.owner.check()
        self._finish_guess()  # it reads codes and pool, which are about to change
        if self.store is not None and n < self.n:
            self.store.truncate(n)
            ends = np.minimum(np.cumsum(self.pieces), n)
            self.pieces = [piece for piece in np.diff(ends, prepend=0).tolist() if piece]
            self.policy.truncate(n)
            if self.codes is not None:
                self.codes.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        """Take these sequences of the batch, in this order."""
        if self.store is not None:
            self.store.reorder(rows)
            self.run.geometry = replace(self.run.geometry, batch=self.store.geometry.batch)
            self.policy.reorder(rows)
            if self.codes is not None:
                self.codes.reorder(rows)

    def reset(self) -> None:
        self.store = self.codes = self.guess = self.seen = None
        self.pieces = []

    def memory(self) -> dict[str, int]:
        """Bytes by kind: device and host KV records; key codes and the policy's index."""
        if self.store is None:
            return {}
        return self.store.memory() | {"codes": self.policy.nbytes + getattr(self.codes, "nbytes", 0)}

    def _start(self, geometry: Geometry, tokens: int) -> None:
        self.run.start(replace(geometry, device=torch.device("cpu")) if self.seen else geometry, tokens)
        self.store = self.run.open_store(self.track)
        self.store = self.seen(self.store, geometry) if self.seen else self.store
        self.policy.device = geometry.device if self.policy.there else torch.device("cpu")
        if self.policy.needs_codes or self.store.scores_keys:
            size = geometry.batch, *geometry.record_shape[1:]
            self.codes = self.open_codes(*size, self.run.settings.bits, self.policy.device)
        self.run.prepare(self.policy, self.index)
        self.policy.start(geometry.batch, geometry.kv_heads, geometry.head_dim)

    def _valid(self, mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """True for cached tokens that may be attended to, (B, n) bool, or None for all."""
        if mask is None:
            return None
        return attention.attendable(mask)[:, 0, 0, : self.n].expand(batch, self.n)
