"""Quest (arXiv 2406.10774): fixed pages of 16 tokens, scored by the min/max boxes of their keys.

As in the paper each KV head has its own pages in memory; on a drive, where a record contains all heads, they share
them. Every layer has the same budget: `QuestDense` is the paper's, which attends densely in the first two layers.
"""

import torch
import torch.nn.functional as F

from hillinfer.evaluator.policy import Policy, Step
from hillinfer.evaluator.topk import highest
from hillinfer.growable import Growable
from hillinfer.systems.boxes import bounds, sortable, widen


class Quest(Policy):
    """The window and the pages of 16 tokens whose min/max bound is highest."""

    needs_codes = False
    per_head = can_speculate = fills = True
    page = 16

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        self.n, self.kv_heads = 0, kv_heads
        self.boxes = Growable((batch, 0, kv_heads, 2, head_dim), 1, torch.float32, self.device)

    def append(self, keys: torch.Tensor) -> None:
        first, at = self.n // self.page, self.n % self.page
        self.n += keys.shape[2]
        more = -(-self.n // self.page) - self.boxes.n
        if more > 0:
            self.boxes.extend(more)
            self.boxes.view()[:, -more:, :, 0], self.boxes.view()[:, -more:, :, 1] = -1e30, 1e30
        widen(self.boxes.view()[:, first:], at, self.page, keys.to(self.device, torch.float32))

    def choose(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Whole pages, as their number must not depend on data: what is of the window or padding does not count."""
        step.notes |= dict.fromkeys(("bounds", "chunks"), -(-(step.n - step.recent) // self.page))
        sinks, last = min(step.sinks, step.n), step.n - step.recent
        order = torch.arange(step.n, dtype=torch.int64, device=self.device).expand(len(step.query), -1)
        start = order[:, :1] * 0 if step.valid is None else step.valid.int().argmax(1, keepdim=True)
        boxes = self.boxes.view()[:, : -(-last // self.page)]
        query = step.query.float().unflatten(1, (self.kv_heads, -1)) * step.scaling
        padding = order[:, : boxes.shape[1]] < start // self.page
        score = bounds(boxes, query).mT.masked_fill(padding[:, None, None], -torch.inf)
        ranks = sortable(score.softmax(3).sum((1, 2))).masked_fill(padding, -1)  # a sum of weights has no sign
        best = highest(ranks, (step.budget - sinks - step.recent) // self.page).sort(1).values
        chosen = (best[:, :, None] * self.page + order[0, : self.page]).flatten(1)
        counts = F.pad((chosen >= start.clamp(min=sinks)) & (chosen < last), (sinks, step.recent), value=True)
        return torch.cat((order[:, :sinks], chosen.clamp(max=step.n - 1), order[:, last:]), 1), counts

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

    def choose(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if step.layer < 2 else super().choose(step)
