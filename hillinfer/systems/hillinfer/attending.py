"""A layer's KV on a drive that computes attention over its records (InstAttention, arXiv 2409.04992).

The drive attends to all tokens outside the window and returns its output with the logsumexp, by which the host
merges its own part. Unlike in the paper, the host holds the most recent tokens. The paper's sparse form (SparF) is not
implemented.
"""

import time

import numpy as np
import torch

from hillinfer import attention
from hillinfer.tiers.tiered_store import TieredStore
from hillinfer.timeline import Served


class AttendingStore(TieredStore):
    """A store without a pool, whose drive computes attention (`ComputationalDrive.begin_attend`)."""

    def attend(self, query, picks, valid, scaling, watch=None, softcap=0.0, sums=True):
        """See `Store.attend`; always over all tokens."""
        everything, size = np.arange(self.n), self.geometry
        near = np.ones(self.n, bool)
        near[self.window.far(everything)] = False
        slots, dtype = torch.from_numpy(self.window.slots(everything[near])), str(size.dtype).removeprefix("torch.")
        scaled = query[:, :, 0].unflatten(1, (size.kv_heads, -1)).float() * scaling  # (B, Hkv, G, D)
        shown = None if valid is None else valid.numpy()
        calls, rows = [], []
        for row, log in enumerate(self.logs):
            far = ~near if shown is None else ~near & shown[row]
            runs = np.flatnonzero(np.diff(np.pad(far.astype(np.int8), 1))).reshape(-1, 2)  # [start, end) each
            calls.append(log.drive.begin_attend(log.stream, scaled[row].numpy(), runs, dtype, softcap))
        for row, call in enumerate(calls):
            start = time.perf_counter_ns()
            kv = self.window.records[row, slots]
            visible = None if valid is None else valid[row : row + 1, torch.from_numpy(near)]
            logits = attention.logits(query[row : row + 1], kv[None, :, 0], visible, scaling, softcap)[0]
            values = kv[:, 1].transpose(0, 1).float()
            near_part = logits.softmax(-1).nan_to_num() @ values, logits.logsumexp(-1)
            attended = self.track.add("cpu", "attend", start, kv.nbytes)
            rows.append(attention.merge([near_part, call.result()]))
            self.track.add("drive", "attend", call.work.start_ns, call.work.nand_bytes, call.work.end_ns)
            self.track.add("cpu", "wait", attended)
        self.settle()
        total, ours = self.n * len(rows), int(near.sum()) * len(rows)
        served = Served(device=ours, drive=total - ours)
        self.track.count(self.n, total if valid is None else int(valid.sum()), served, 0)
        out, lse = (torch.stack(part).flatten(1, 2) for part in zip(*rows, strict=True))
        return out.to(query.dtype).unsqueeze(1), lse
