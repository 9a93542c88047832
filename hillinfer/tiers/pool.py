"""The hot pool: the part of one layer's records that host memory keeps, in front of the drive (HillInfer HKM).

The drive holds every record, so demotion moves no bytes: a demoted slot is simply taken over. Promotion copies a
record that the step had to fetch anyway.
"""

import numpy as np
import torch

from hillinfer.growable import Growable
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import SharedHits

ABSENT, DEMOTED = -1, -2


class HotPool:
    """Slots of records for one layer and batch row, ranked by the shared hit counters."""

    def __init__(self, geometry: Geometry, row: int, hits: SharedHits):
        self.row, self.hits = row, hits
        self.records = Growable((0, *geometry.record_shape), 0, geometry.dtype)
        self.token_of = np.zeros(0, np.int64)  # slot -> token, -1 where free
        self.slot_of = np.zeros(0, np.int32)  # token -> slot, ABSENT or DEMOTED
        self.pinned_from = 0  # tokens from here on never leave

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """Slot of each position, negative (ABSENT or DEMOTED) where it is not in the pool. (k,) -> (k,)."""
        found = np.full(len(positions), ABSENT, np.int32)
        known = positions < len(self.slot_of)
        found[known] = self.slot_of[positions[known]]
        return found

    def take(self, slots: np.ndarray) -> torch.Tensor:
        """Records in these slots: (k, 2, Hkv, D)."""
        return self.records.view().index_select(0, torch.from_numpy(slots.astype(np.int64)))

    def resize(self, capacity: int) -> None:
        """Let the pool hold up to `capacity` tokens; where it holds more, the least-hit unpinned ones go."""
        more = capacity - len(self.token_of)
        if more < 0:
            self._shrink(capacity)
        elif more > 0:
            self.records.extend(more)  # with room to spare: a pool grows at nearly every step
            self.token_of = np.append(self.token_of, np.full(more, -1, np.int64))

    def _shrink(self, capacity: int) -> None:
        """Never below what is pinned."""
        surplus = len(self.token_of) - capacity
        leaving = np.concatenate((np.flatnonzero(self.token_of < 0), self._victims(surplus)))[:surplus]
        gone = self.token_of[leaving]
        self.slot_of[gone[gone >= 0]] = DEMOTED
        kept = np.setdiff1d(np.arange(len(self.token_of)), leaving)
        smaller = Growable((len(kept), *self.records.data.shape[1:]), 0, self.records.data.dtype)
        smaller.append(self.records.view()[torch.from_numpy(kept)])
        self.records, self.token_of = smaller, self.token_of[kept]
        held = np.flatnonzero(self.token_of >= 0)
        self.slot_of[self.token_of[held]] = held

    def admit(self, tokens: np.ndarray, records: torch.Tensor) -> None:
        """Take in new tokens (ascending), the newest first, over free slots and then over the least-hit unpinned
        ones.
        """
        slots = np.concatenate((np.flatnonzero(self.token_of < 0), self._victims(len(tokens))))
        kept = min(len(tokens), len(slots))
        if kept:
            self._place(tokens[-kept:], slots[:kept])
            self.records.view()[torch.from_numpy(slots[:kept])] = records[-kept:]

    def swap(self, tokens: np.ndarray, brought) -> int:
        """Promote fetched tokens that outrank residents, each in place of one: pool sizes stay (HKM rule 3). Returns
        how many. `brought.copy_to` has their records.
        """
        if not len(tokens):
            return 0
        rank = self.hits.rank[self.row]
        order = np.argsort(-rank[tokens].astype(np.int64), kind="stable")
        free = np.flatnonzero(self.token_of < 0)
        victims = self._victims(len(tokens))
        slots = np.concatenate((free, victims))[: len(tokens)]
        # Both lists are sorted against each other, so the swaps worth making are a prefix.
        resident = np.concatenate((np.full(len(free), -1), rank[self.token_of[victims]].astype(np.int64)))[
            : len(tokens)
        ]
        worth = int((rank[tokens[order[: len(slots)]]] > resident).sum())
        chosen = order[:worth]
        self._place(tokens[chosen], slots[:worth])
        brought.copy_to(chosen, self.records.view(), slots[:worth])
        return worth

    def truncate(self, n: int) -> None:
        gone = np.flatnonzero(self.token_of >= n)
        self.token_of[gone] = -1
        self.slot_of = self.slot_of[:n]

    def _victims(self, most: int) -> np.ndarray:
        """Up to `most` slots that may be taken over, least hit and then oldest first."""
        slots = np.flatnonzero((self.token_of >= 0) & (self.token_of < self.pinned_from))
        tokens = self.token_of[slots]
        order = (self.hits.rank[self.row, tokens].astype(np.int64) << 32) + tokens  # no two are alike
        if most < len(slots):  # sorting all of them at every step would cost more than the attention
            least = np.argpartition(order, most)[:most]
            slots, order = slots[least], order[least]
        return slots[np.argsort(order)]

    def _place(self, tokens: np.ndarray, slots: np.ndarray) -> None:
        """Note who is where from now on; the caller brings the records."""
        if len(tokens) == 0:
            return
        old = self.token_of[slots]
        self.slot_of[old[old >= 0]] = DEMOTED
        short = int(tokens.max()) + 1 - len(self.slot_of)
        if short > 0:
            self.slot_of = np.append(self.slot_of, np.full(max(short, 256), ABSENT, np.int32))
        self.token_of[slots], self.slot_of[tokens] = tokens, slots

    @property
    def nbytes(self) -> int:
        return self.records.view().nbytes  # the spare room was never touched: it takes no memory
