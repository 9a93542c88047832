"""LeoAM (arXiv 2506.20187): a tree of variable-size chunks per layer, judged by bounds from the top.

Of the paper's parts, here is the importance-aware manager (IAKM): chunks merged over attention deserts and split where
it matters, each with a small abstract (LKA). The paper leaves the bound, the sizes and the rules open: the bound is
Quest's, the rest is in `evaluator.chunks`. Chunks are chosen for a layer's KV heads together.
"""

import copy

import numpy as np
import torch

from hillinfer.evaluator.policy import Policy, Step
from hillinfer.systems.leoam.pages import Pages
from hillinfer.systems.leoam.tree import LEAF, NODES, ChunkTree


class LeoAM(Policy):
    """The device window and the chunks of highest bound, found top-down in a tree that follows the attention."""

    needs_codes = False
    can_speculate = True
    desert = 12.0  # logits below the newest tokens' best, where a weight is under e**-12: no head looks there
    newest = 16  # tokens whose keys are kept to know that best

    open_pages = staticmethod(lambda row, shape: Pages(shape))  # a run with a drive keeps them there

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        shape = (NODES, kv_heads, 2, head_dim)
        self.kv_heads = kv_heads
        self.keys = torch.zeros(batch, kv_heads, 0, head_dim)
        self.trees = [ChunkTree(kv_heads, head_dim, self.open_pages(row, shape)) for row in range(batch)]

    def append(self, keys: torch.Tensor) -> None:
        keys = keys.to("cpu", torch.float32)
        self.keys = torch.cat((self.keys, keys), 2)[:, :, -self.newest :].clone()
        for tree, own in zip(self.trees, keys, strict=True):
            tree.append(own)

    def select(self, step: Step) -> np.ndarray | None:
        if step.budget >= step.n:
            return None
        near, tree = step.near()[-step.budget :], self.trees[step.row]
        k = (step.budget - len(near)) // LEAF
        query = step.grouped(self.kv_heads)
        newest = self.keys[step.row][:, -step.recent :]
        best = (query @ newest.transpose(1, 2)).amax(2) if newest.shape[1] else torch.full(query.shape[:2], -torch.inf)
        floor, last = best - self.desert / step.scaling, step.n - step.recent
        leaves, evaluated = tree.search(query, k, step.first, last, not step.guess, floor)
        step.notes |= {"bounds": evaluated, "chunks": int(tree.cut.sum())}
        step.work += tree.pages.work
        tree.pages.work = []
        chosen = (leaves[:, None] + np.arange(LEAF)).ravel()
        return np.union1d(near, chosen[(chosen >= step.first) & (chosen < step.n)])

    def truncate(self, n: int) -> None:
        self.keys = self.keys[:, :, : max(0, self.keys.shape[2] - self.trees[0].n + n)]
        for tree in self.trees:
            tree.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.keys = self.keys[rows.to("cpu")]
        self.trees = [copy.deepcopy(self.trees[row]) for row in rows.tolist()]

    @property
    def nbytes(self) -> int:
        return sum(tree.nbytes for tree in self.trees)
