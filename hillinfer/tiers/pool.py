"""The hot pool: a cache in host memory of one layer's records on the drive (HillInfer HKM).

The drive has every record, so demotion moves no bytes: the slot is overwritten. Promotion copies a record that the step
had to fetch anyway.
"""

import numpy as np
import torch

from hillinfer.growable import Growable
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import SharedHits
from hillinfer.tiers.records import Selection

ABSENT, DEMOTED, PASSED = -1, -2, -3  # PASSED: read for a step, and not promoted


class HotPool:
    """Slots of records for one layer and sequence, ranked by the hit counters."""

    def __init__(self, geometry: Geometry, row: int, hits: SharedHits):
        self.row, self.hits = row, hits
        self.records = Growable((0, *geometry.record_shape), 0, geometry.dtype)
        self.token_of = np.zeros(0, np.int64)  # slot -> token, -1 where free
        self.slot_of = np.zeros(0, np.int32)  # token -> slot, or why it has none
        self.pinned_from = 0  # first of the pinned tokens

    def slots(self, positions: np.ndarray, least: int = 0) -> np.ndarray:
        """Slot of each position, negative if it is not in the pool. (k,) -> (k,).

        A pool that has room for fewer than `least` tokens is taken for empty.
        """
        if len(self.token_of) < least:
            return np.full(len(positions), ABSENT, np.int32)
        return self.slot_of[positions]

    def resize(self, capacity: int) -> None:
        """Change the capacity in tokens. A smaller pool evicts the least-hit unpinned tokens."""
        more = capacity - len(self.token_of)
        if more < 0:
            self._shrink(capacity)
        elif more > 0:
            self.records.extend(more)  # amortised: a pool grows at nearly every step
            self.token_of = np.append(self.token_of, np.full(more, -1, np.int64))

    def _shrink(self, capacity: int) -> None:
        """Never evicts pinned tokens."""
        surplus = len(self.token_of) - capacity
        leaving = np.concatenate((np.flatnonzero(self.token_of < 0), self._victims(surplus)))[:surplus]
        gone = self.token_of[leaving]
        self.slot_of[gone[gone >= 0]] = DEMOTED
        staying = np.setdiff1d(np.arange(len(self.token_of)), leaving)
        smaller = Growable((len(staying), *self.records.data.shape[1:]), 0, self.records.data.dtype)
        smaller.append(self.records.view()[torch.from_numpy(staying)])
        self.records, self.token_of = smaller, self.token_of[staying]
        used = np.flatnonzero(self.token_of >= 0)
        self.slot_of[self.token_of[used]] = used

    def admit(self, tokens: np.ndarray, records: torch.Tensor) -> None:
        """Insert new tokens (ascending), the newest first, into free slots, then over the least-hit unpinned ones."""
        if (short := int(tokens[-1]) + 1 - len(self.slot_of)) > 0:
            self.slot_of = np.append(self.slot_of, np.full(max(short, 256), ABSENT, np.int32))
        slots = np.concatenate((np.flatnonzero(self.token_of < 0), self._victims(len(tokens))))
        if count := min(len(tokens), len(slots)):
            self._place(tokens[-count:], slots[:count])
            self.records.view()[torch.from_numpy(slots[:count])] = records[-count:]

    def swap(self, tokens: np.ndarray, records: Selection) -> int:
        """Promote fetched tokens that outrank residents, one for one, so that pool sizes stay (HKM rule 3).

        Returns the number of promoted tokens.
        """
        rank = self.hits.rank[self.row]
        order = np.argsort(-rank[tokens].astype(np.int64), kind="stable")
        free = np.flatnonzero(self.token_of < 0)
        victims = self._victims(len(tokens))
        slots = np.concatenate((free, victims))[: len(tokens)]
        # Candidates in descending, victims in ascending order: the swaps that pay are a prefix.
        weakest = rank[self.token_of[victims]].astype(np.int64)
        resident = np.concatenate((np.full(len(free), -1), weakest))[: len(tokens)]
        worth = int((rank[tokens[order[: len(slots)]]] > resident).sum())
        chosen = order[:worth]
        self._place(tokens[chosen], slots[:worth])
        records.copy_to(chosen, self.records.view(), slots[:worth])
        return worth

    def passed(self, tokens: np.ndarray) -> None:
        """A step had to read these."""
        self.slot_of[tokens[self.slot_of[tokens] == ABSENT]] = PASSED

    def truncate(self, n: int) -> None:
        gone = np.flatnonzero(self.token_of >= n)
        self.token_of[gone] = -1
        self.slot_of = self.slot_of[:n]

    def _victims(self, most: int) -> np.ndarray:
        """Up to `most` unpinned slots, least hit first, then oldest."""
        slots = np.flatnonzero((self.token_of >= 0) & (self.token_of < self.pinned_from))
        tokens = self.token_of[slots]
        order = (self.hits.rank[self.row, tokens].astype(np.int64) << 32) + tokens  # all distinct
        if most < len(slots):  # sorting all slots at every step would cost more than attention
            least = np.argpartition(order, most)[:most]
            slots, order = slots[least], order[least]
        return slots[np.argsort(order)]

    def _place(self, tokens: np.ndarray, slots: np.ndarray) -> None:
        """Assign slots to tokens; the caller copies the records."""
        old = self.token_of[slots]
        self.slot_of[old[old >= 0]] = DEMOTED
        self.token_of[slots], self.slot_of[tokens] = tokens, slots

    @property
    def nbytes(self) -> int:
        return self.records.view().nbytes  # spare capacity is untouched and takes no memory
