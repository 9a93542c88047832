"""One layer's part of `Tensors`, with the contract of `tiers.store`."""

import time

import numpy as np
import torch

from hillinfer.systems.lossless.plan import NEAR
from hillinfer.systems.lossless.tensors import Tensors
from hillinfer.tiers.store import Found


class TensorStore:
    """Tokens of tensors that begin on the near path count as the host's, the others as the drive's."""

    def __init__(self, tensors: Tensors, layer: int):
        self.tensors, self.layer, self.n = tensors, layer, 0

    def append(self, kv: torch.Tensor, coded=None) -> list:
        start = time.perf_counter_ns()
        written = self.tensors.append(self.layer, kv, self.n)
        self.n += kv.shape[1]
        return [("drive", "write", start, time.perf_counter_ns(), written)] if written else []

    def all(self) -> tuple[torch.Tensor, Found]:
        start, tokens = time.perf_counter_ns(), self.n * self.tensors.geometry.batch
        kv = self.tensors.resident(self.layer, self.n)
        if kv is None:
            kv, work = self.tensors.slots.take(self.layer, self.n)
            extents = [self.tensors.plan.extents[tensor.index] for tensor in self.tensors.pair(self.layer)]
            near = tokens * sum(own[0].path == NEAR for own in extents) // 2
            return kv, Found(host=near, drive=tokens - near, work=work)
        if kv.device == self.tensors.geometry.device:
            return kv, Found(host=tokens, work=[("cpu", "view", start, time.perf_counter_ns(), 0)])
        kv = kv.to(self.tensors.geometry.device)
        return kv, Found(host=tokens, work=[("link", "transfer", start, time.perf_counter_ns(), kv.nbytes)])

    def fetch(self, row: int, positions: np.ndarray, ahead=None) -> tuple[torch.Tensor, Found]:
        """All are brought, and these (k,) picked: whole tensors are the unit here."""
        kv, found = self.all()
        host = len(positions) * found.host // (found.host + found.drive)
        picked = kv[row].index_select(0, torch.from_numpy(positions).to(kv.device))
        return picked, Found(host=host, drive=len(positions) - host, work=found.work)

    def settle(self) -> int:
        self.tensors.slots.release()
        return 0

    def truncate(self, n: int) -> None:
        self.tensors.truncate(self.layer, n)
        self.n = n

    def memory(self) -> dict[str, int]:
        return self.tensors.memory(self.layer)
