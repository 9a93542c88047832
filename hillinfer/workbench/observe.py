"""Record the attention of each layer and head during a run, aggregated to blocks of positions (never T x T)."""

import time
import weakref
from dataclasses import dataclass, replace

import numpy as np

from hillinfer.attention import Observed
from hillinfer.cache import TieredCache
from hillinfer.tiers.store import HostStore, Store
from hillinfer.tiers.tiered_store import TieredStore
from hillinfer.workbench.pyramid import TIERS, AttentionMap

SHARE = 0.9  # of a head's attention mass
KEEP = 64 << 20  # bytes of snapshots; the oldest steps are dropped


@dataclass(frozen=True)
class AttentionSnapshot:
    """Attention of one layer in one step, of the first sequence in the batch.

    The weights cover all cached tokens if the record is exact, else the selected tokens.
    """

    n: int  # cached tokens
    block: int  # positions per block
    mass: np.ndarray  # (H, blocks) float16, attention mass by block; each row sums to 1
    chosen: np.ndarray  # (blocks,) selected tokens per block; the mean over KV heads, if these select apart
    needed: np.ndarray  # (H,) float32, smallest number of tokens that hold SHARE of the attention mass
    recall: np.ndarray | None  # (H,) float32, share of the exact attention mass on selected tokens; None if not exact

    def beside(self, other: "AttentionSnapshot") -> "AttentionSnapshot":
        """Both snapshots' heads, of one layer and step."""
        both = {name: (getattr(self, name), getattr(other, name)) for name in ("mass", "needed", "recall")}
        joined = {name: None if mine is None else np.concatenate((mine, more)) for name, (mine, more) in both.items()}
        chosen = np.average((self.chosen, other.chosen), 0, (len(self.mass), len(other.mass)))
        return replace(self, chosen=chosen.astype(np.float32), **joined)


class AttentionRecord:
    """`AttentionSnapshot`s of the latest steps, by step and layer, in at most 64 MiB. `watch(cache)` fills it.

    blocks  maximum number of blocks that positions are aggregated to
    exact   weigh all cached tokens. This reads all KV at every step, so it is meant for analysis
    budget  maximum share of run time spent on observation; steps are skipped to stay within it. None records every step
    map     filled with every position of the recorded steps, in another 64 MB at most
    """

    def __init__(
        self,
        blocks: int = 256,
        exact: bool = False,
        budget: float | None = None,
        map: AttentionMap | None = None,
    ):
        self.blocks, self.exact, self.budget, self.map = blocks, exact, budget, map
        self._cache = lambda: None
        self.steps: dict[int, dict[int, AttentionSnapshot]] = {}  # oldest first; the newest may be incomplete
        self.skipped = 0  # steps not recorded, or dropped since
        self._on, self._bytes, self._step = False, 0, None
        self._began = self._at = self._spent = self._plain = self._took = 0  # ns

    def watch(self, cache: TieredCache) -> None:
        """Record the coming steps of this cache."""
        cache.run.observer, self._cache = self, weakref.ref(cache)

    def should_observe(self, layer: int, step: int) -> bool:
        """True if this step is to be recorded. Decided once per step, at the first call."""
        if step != self._step:
            now = time.perf_counter_ns()
            self._began = self._began or now
            self._charge(now - self._at)
            self._step, self._at, self._took = step, now, 0
            self._on = self.budget is None or self._spent <= self.budget * (now - self._began)
            self.skipped += not self._on
        return self._on

    def _charge(self, step_ns: int) -> None:
        """Charge the previous step to the budget: its observation time, or its excess over unobserved steps if larger.

        The excess includes the loss of in-place attention, which an observed step cannot use.
        """
        if self._on:
            self._spent += max(self._took, step_ns - self._plain if self._plain else 0)
        elif self._step is not None:
            self._plain = step_ns if not self._plain else (7 * self._plain + step_ns) // 8

    def observe(self, seen: Observed) -> None:
        """Record one layer's attention in one step."""
        start, n, pick = time.perf_counter_ns(), seen.n, seen.positions
        weights, positions = seen.weights(self.exact), np.arange(n) if self.exact else pick
        block = block_size(n, self.blocks)
        edges = np.searchsorted(positions, np.arange(0, n, block))
        totals = np.concatenate((np.zeros((len(weights), 1)), weights.cumsum(1, dtype=np.float64)), 1)
        best = -np.sort(-weights, 1)
        snapshot = AttentionSnapshot(
            n,
            block,
            np.diff(totals[:, np.append(edges, len(positions))], axis=1).astype(np.float16),
            np.bincount(pick // block, minlength=len(edges)).astype(np.int32),
            ((best.cumsum(1) < SHARE).sum(1) + 1).astype(np.float32),
            weights[:, pick].sum(1) if self.exact else None,
        )
        if self.map is not None:
            cache = self._cache()
            store = cache.tiered[seen.layer].store if cache else None
            picked = None if seen.pick is None else (pick, tiers_of(store, pick))
            self.map.add(seen.layer, weights, None if self.exact else positions, *(picked or ()), step=seen.step)
        layers = self.steps.setdefault(seen.step, {})
        earlier = layers.get(seen.layer)
        layers[seen.layer] = earlier.beside(snapshot) if earlier else snapshot
        self._bytes += snapshot.mass.nbytes + snapshot.chosen.nbytes
        while self._bytes > KEEP and len(self.steps) > 1:
            oldest = self.steps.pop(next(iter(self.steps)))
            self._bytes -= sum(part.mass.nbytes + part.chosen.nbytes for part in oldest.values())
            self.skipped += 1
        self._took += time.perf_counter_ns() - start

    def snapshots_at(self, step: int | None = None) -> tuple[int, dict[int, AttentionSnapshot]] | None:
        """The latest complete step, or the last one up to `step`, with its snapshots by layer. None without any step.

        For a `step` before all recorded ones, the first recorded step is returned.
        """
        items = list(self.steps.items())  # a copy: the run continues in its own thread
        complete = [one for one, layers in items if len(layers) == len(items[0][1])]
        if step is not None:
            complete = [one for one in complete if one <= step] or complete[:1]
        found = self.steps.get(complete[-1]) if complete else None
        return None if found is None else (complete[-1], dict(found))

    def needed(self, step: int | None = None) -> np.ndarray:
        """(layers, H): share of the cached tokens that holds 90 % of each head's attention.

        The mean over all recorded steps, or the values of one `step`.
        """
        steps = list(self.steps.values()) if step is None else [self.steps[step]]
        return np.mean([[s[layer].needed / s[layer].n for layer in sorted(s)] for s in steps], 0)


def tiers_of(store: Store | None, positions: np.ndarray) -> np.ndarray:
    """Where the first sequence's records at sorted positions (k,) lie until the step is settled: codes of TIERS."""
    if isinstance(store, HostStore):
        return np.full(len(positions), TIERS.index(store.tier), np.uint8)
    if not isinstance(store, TieredStore):
        return np.full(len(positions), 3, np.uint8)
    tiers, far = np.zeros(len(positions), np.uint8), store.window.far(positions)  # the window is the device's
    tiers[far] = np.where(store.pools[0].slots(positions[far]) >= 0, 1, 2)
    return tiers


def block_size(n: int, blocks: int) -> int:
    """Smallest power of two that covers n positions in at most `blocks` blocks. It stays stable while a text grows."""
    size = 1
    while size * blocks < n:
        size *= 2
    return size
