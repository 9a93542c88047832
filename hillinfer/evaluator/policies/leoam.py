"""LeoAM (arXiv 2506.20187): a tree of variable-size chunks per layer, judged by bounds from the top.

Of the paper's parts, here is the importance-aware manager (IAKM): chunks merged over attention deserts and split where
it matters, each with a small abstract (LKA). The paper leaves the bound, the sizes and the rules open: the bound is
Quest's, the rest is in `evaluator.chunks`. Chunks are chosen for a layer's KV heads together.
"""

import copy

import numpy as np
import torch

from hillinfer.evaluator.chunks import LEAF, NODES, ChunkTree
from hillinfer.evaluator.policy import Policy, Step


class LeoAM(Policy):
    """The device window and the chunks of highest bound, found top-down in a tree that follows the attention."""

    needs_codes = False
    can_speculate = True
    paged = True

    def start(self, batch: int, kv_heads: int, head_dim: int, pages) -> None:
        shape = (NODES, kv_heads, 2, head_dim)
        self.kv_heads = kv_heads
        self.trees = [ChunkTree(kv_heads, head_dim, pages(row, shape)) for row in range(batch)]

    def append(self, keys: torch.Tensor) -> None:
        for tree, own in zip(self.trees, keys.to("cpu", torch.float32), strict=True):
            tree.append(own)

    def select(self, step: Step) -> np.ndarray | None:
        if step.budget >= step.n:
            return None
        near, tree = step.near()[-step.budget :], self.trees[step.row]
        k = (step.budget - len(near)) // LEAF
        query = step.grouped(self.kv_heads)
        leaves, evaluated = tree.search(query, k, step.first, step.n - step.recent, learn=not step.guess)
        step.notes |= {"bounds": evaluated, "chunks": int(tree.cut.sum())}
        step.work += tree.pages.work
        tree.pages.work = []
        chosen = (leaves[:, None] + np.arange(LEAF)).ravel()
        return np.union1d(near, chosen[(chosen >= step.first) & (chosen < step.n)])

    def truncate(self, n: int) -> None:
        for tree in self.trees:
            tree.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.trees = [copy.deepcopy(self.trees[row]) for row in rows.tolist()]

    @property
    def nbytes(self) -> int:
        return sum(tree.nbytes for tree in self.trees)
