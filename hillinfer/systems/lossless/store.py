"""One layer of `Tensors` as a store, read and written as whole tensors."""

import time

import numpy as np
import torch

from hillinfer.attention import to_device
from hillinfer.systems.lossless.plan import NEAR
from hillinfer.systems.lossless.tensors import Tensors
from hillinfer.tiers.store import Store
from hillinfer.timeline import Counters, Served, Timeline, Track


class TensorStore(Store):
    """Hits count tokens of a tensor by its first extent: near is the host's, direct the drive's."""

    in_place = False  # single records cannot be addressed

    def __init__(self, tensors: Tensors, layer: int, track: Track | None = None):
        self.tensors, self.layer, self.n, self.geometry = tensors, layer, 0, tensors.geometry
        self.track = track or Track(Timeline(), Counters(), layer)

    def append(self, kv: torch.Tensor, codes=None) -> None:
        start = time.perf_counter_ns()
        written = self.tensors.append(self.layer, kv, self.n)
        self.n += kv.shape[1]
        if written:
            self.track.add("drive", "write", start, written)

    def all(self) -> tuple[torch.Tensor, Served]:
        start, tokens = time.perf_counter_ns(), self.n * self.geometry.batch
        kv = self.tensors.resident(self.layer, self.n)
        if kv is None:
            kv = self.tensors.slots.take(self.layer, self.n, self.track)
            pair = self.tensors.plan.extents[2 * self.layer : 2 * self.layer + 2]
            near = tokens * sum(extents[0].path == NEAR for extents in pair) // 2
            return kv, Served(host=near, drive=tokens - near)
        if kv.device == self.geometry.device:
            self.track.add("cpu", "view", start)
        else:
            kv = to_device(kv, self.geometry.device)
            self.track.add("link", "transfer", start, kv.nbytes)
        return kv, Served(host=tokens)

    def fetch(self, row: int, positions: np.ndarray) -> tuple[torch.Tensor, Served]:
        """Reads the whole tensors and picks the records of these positions (k,)."""
        kv, served = self.all()
        host = len(positions) * served.host // (served.host + served.drive)
        picked = kv[row].index_select(0, torch.from_numpy(positions).to(kv.device))
        return picked, Served(host=host, drive=len(positions) - host)

    def settle(self) -> int:
        """Release the layer's transfer buffer."""
        self.tensors.slots.release()
        return 0

    def truncate(self, n: int) -> None:
        self.tensors.truncate(self.layer, n)
        self.n = n

    def memory(self) -> dict[str, int]:
        return self.tensors.memory(self.layer)
