"""A layer's KV on a drive that attends to what it holds (InstAttention, arXiv 2409.04992): no record travels.

The drive attends to all tokens but those of the device window, and sends its output with the logarithm of the sum of
exponentials, with which the host merges its own. Unlike in the paper the tokens next to the query are the host's.
"""

import time

import numpy as np
import torch

from hillinfer.systems.hillinfer.scoring import ScoringStore
from hillinfer.tiers.store import Found


class AttendingStore(ScoringStore):
    """A `DriveStore` without a pool, whose drive computes attention. The drive needs `begin_attend`."""

    def _tell(self) -> None:
        """The drive scores nothing, so that it need not know what is hot."""

    def attend(self, query: torch.Tensor, valid: np.ndarray | None, scaling: float) -> tuple[torch.Tensor, Found]:
        """Attention of a query (B, H, D) over all tokens: (B, H, D). valid (B, n) bool, or None."""
        found, rows = Found(), []
        query = query.unflatten(1, (self.geometry.kv_heads, -1)).float() * scaling  # (B, Hkv, G, D)
        everything = np.arange(self.n)
        near = np.ones(self.n, bool)
        near[self.window.far(everything)] = False
        calls = []
        for row in range(self.geometry.batch):
            far = ~near if valid is None else ~near & valid[row]
            edges = np.flatnonzero(np.diff(np.pad(far.astype(np.int8), 1))).reshape(-1, 2)  # runs [start, end)
            stream = self.streams[row]
            calls.append(stream.drive.begin_attend(stream.index, query[row].numpy(force=True), edges, self._dtype))
            found.device, found.drive = found.device + int(near.sum()), found.drive + self.n - int(near.sum())
        for row, call in enumerate(calls):
            start = time.perf_counter_ns()
            slots = torch.from_numpy(self.window.slots(everything[near]))
            kv = self.window.records[row, slots].float()  # (m, 2, Hkv, D)
            logits = query[row] @ kv[:, 0].permute(1, 2, 0)
            if valid is not None:
                logits[..., torch.from_numpy(~valid[row][near]).to(logits.device)] = -torch.inf
            own = logits.softmax(-1).nan_to_num() @ kv[:, 1].transpose(0, 1)
            weight = logits.logsumexp(-1, keepdim=True)
            attended = time.perf_counter_ns()
            theirs, their_weight = (torch.from_numpy(part).to(own.device) for part in call.result())
            total = torch.logaddexp(weight, their_weight)
            rows.append(own * (weight - total).exp() + theirs * (their_weight - total).exp())
            work = call.work
            found.work += [
                ("cpu", "attend", start, attended, kv.nbytes),
                ("drive", "attend", work.start_ns, work.end_ns, work.nand_bytes),
                ("cpu", "wait", attended, time.perf_counter_ns(), 0),
            ]
        return torch.stack(rows).flatten(1, 2).to(self.geometry.dtype), found

    @property
    def _dtype(self) -> str:
        return str(self.geometry.dtype).removeprefix("torch.")
