"""Quest (arXiv 2406.10774): fixed pages of 16 tokens, scored by the min/max boxes of their keys.

As in the paper each KV head has its own pages in memory; on a drive, where a record contains all heads, they share
them. Every layer has the same budget: `QuestDense` is the paper's, which attends densely in the first two layers.
"""

import numpy as np
import torch

from hillinfer.evaluator.boxes import EMPTY, bounds, sortable, widen
from hillinfer.evaluator.policy import Policy, Step
from hillinfer.evaluator.topk import topk
from hillinfer.growable import Growable


class Quest(Policy):
    """The device window and the pages of 16 tokens whose min/max bound is highest."""

    needs_codes = False
    per_head = True
    can_speculate = True
    page = 16

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        self.n, self.kv_heads = 0, kv_heads
        self.boxes = Growable((batch, 0, kv_heads, 2, head_dim), 1, torch.float32)

    def append(self, keys: torch.Tensor) -> None:
        keys = keys.to("cpu", torch.float32)
        batch, _, new, dim = keys.shape
        index = torch.arange(self.n, self.n + new, device="cpu") // self.page
        self.n += new
        more = -(-self.n // self.page) - self.boxes.n
        if more > 0:
            self.boxes.append(EMPTY.expand(batch, more, self.kv_heads, 2, dim))
        for boxes, added in zip(self.boxes.view(), keys, strict=True):
            widen(boxes, index, added)

    def select(self, step: Step) -> np.ndarray | None:
        if step.budget >= step.n:
            return None
        near = step.near()[-step.budget :]
        first, last = step.first // self.page, -(-(step.n - step.recent) // self.page)
        weights = self.weights(step.row, step.grouped(self.kv_heads) * step.scaling, first, last)
        step.notes |= {"bounds": last - first, "chunks": last - first}
        best = first + topk(sortable(weights.sum((0, 1)).numpy()), (step.budget - len(near)) // self.page)
        chosen = (best[:, None] * self.page + np.arange(self.page)).ravel()
        return np.union1d(near, chosen[(chosen >= step.first) & (chosen < step.n)])

    def weights(self, row: int, query: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Softmax over pages first..last-1 of their bounds for a scaled query (Hkv, G, D): (Hkv, G, last - first)."""
        return bounds(self.boxes.view()[row, first:last], query).transpose(1, 2).softmax(2)

    def truncate(self, n: int) -> None:
        """The box of a page that n cuts through keeps its width: it is still a bound."""
        self.n = n
        self.boxes.truncate(-(-n // self.page))

    def reorder(self, rows: torch.Tensor) -> None:
        self.boxes.reorder(rows)

    @property
    def nbytes(self) -> int:
        return self.boxes.view().nbytes


class QuestDense(Quest):
    """`quest` with the first two layers dense, as in its paper."""

    def select(self, step: Step) -> np.ndarray | None:
        return None if step.layer < 2 else super().select(step)
