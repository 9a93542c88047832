"""LeoAM as its author's released code has it (github.com/ustc-sunny/Long_Infer_KV), beside the tree of the paper.

Chunks of 8 tokens in the first two layers and of 128 in the others, with one bound for all heads together, their sum.
Of the tokens in chunks of twice the budget, the best are attended to. There they rank by exact scores, summed like the
bounds, and the budget is half of all tokens in the first two layers and a fifth in the others; here they rank by their
codes, and the budget is that of every system.
"""

import numpy as np
import torch

from hillinfer.evaluator.policy import Step
from hillinfer.evaluator.topk import topk
from hillinfer.systems.baselines.quest import Quest
from hillinfer.systems.boxes import EMPTY, bounds, sortable

FINE = 2  # layers


class LeoAMReleased(Quest):
    """The window and the best tokens of the chunks of highest bound, as in LeoAM's released code."""

    needs_codes = True
    per_head = False
    page, coarse = 8, 16  # tokens; pages of a chunk beyond the first layers

    def select(self, step: Step) -> np.ndarray | None:
        boxes, join = self.boxes.view()[step.row], 1 if step.layer < FINE else self.coarse
        boxes = torch.cat((boxes, EMPTY.expand(-len(boxes) % join, *boxes.shape[1:]))).unflatten(0, (-1, join))
        boxes = torch.stack((boxes[..., 0, :].amax(1), boxes[..., 1, :].amin(1)), 2)
        bound, size = bounds(boxes, step.grouped(self.kv_heads)).sum((0, 2)), self.page * join
        near = step.near()[-step.budget :]
        chunks = topk(sortable(bound.numpy()), -(-2 * step.budget // size))
        tokens = np.setdiff1d((chunks[:, None] * size + np.arange(size)).ravel(), near)
        tokens = tokens[(tokens >= step.first) & (tokens < step.n)]
        step.notes |= {"bounds": len(boxes), "chunks": len(chunks)}
        best = topk(step.scores()[tokens], step.budget - len(near))
        return np.union1d(near, tokens[best])
