"""LeoAM (arXiv 2506.20187): a tree of variable-size chunks per layer, searched top-down by upper bounds.

This is the paper's importance-aware KV manager (IAKM): chunks are merged over attention deserts and split around
important tokens, and each has a small abstract (LKA). The paper leaves the bound, the sizes and the rules open: the
bound is Quest's, the rest is in `tree`. All KV heads of a layer share one selection.
"""

import copy

import numpy as np
import torch

from hillinfer.evaluator.policy import Policy, Step
from hillinfer.systems.leoam.pages import Pages
from hillinfer.systems.leoam.tree import LEAF, NODES, ChunkTree


class LeoAM(Policy):
    """The window and the chunks of highest bound, found top-down in a tree that adapts to the attention."""

    needs_codes = False
    can_speculate = fills = True
    desert = 12.0  # logits below the best of the newest tokens, where weights are under e**-12
    newest = 16  # tokens whose keys are kept for that comparison

    open_pages = staticmethod(lambda row, shape: Pages(shape))  # replaced by a run with a drive

    def start(self, batch: int, kv_heads: int, head_dim: int) -> None:
        shape = (NODES, kv_heads, 2, head_dim)
        self.kv_heads = kv_heads
        self.newest_keys = torch.zeros(batch, kv_heads, 0, head_dim, dtype=torch.float32, device="cpu")
        self.trees = [ChunkTree(kv_heads, head_dim, self.open_pages(row, shape)) for row in range(batch)]

    def append(self, keys: torch.Tensor) -> None:
        keys = keys.to("cpu", torch.float32)
        self.newest_keys = torch.cat((self.newest_keys, keys), 2)[:, :, -self.newest :].clone()
        for tree, new in zip(self.trees, keys, strict=True):
            tree.append(new)

    def select(self, step: Step) -> np.ndarray | None:
        near, tree = step.near()[-step.budget :], self.trees[step.row]
        k = (step.budget - len(near)) // LEAF
        query = step.grouped(self.kv_heads)
        newest = self.newest_keys[step.row][:, -step.recent :]
        none = query.new_full((*query.shape[:2], 1), -torch.inf)
        best = torch.cat((query @ newest.transpose(1, 2), none), 2).amax(2)
        floor, last = best - self.desert / step.scaling, step.n - step.recent
        leaves, evaluated = tree.search(query, k, step.first, last, not step.guess, floor)
        step.notes |= {"bounds": evaluated, "chunks": int(tree.cut.sum())}
        chosen = (leaves[:, None] + np.arange(LEAF)).ravel()
        return np.union1d(near, chosen[(chosen >= step.first) & (chosen < step.n)])

    def truncate(self, n: int) -> None:
        self.newest_keys = self.newest_keys[:, :, : max(0, self.newest_keys.shape[2] - self.trees[0].n + n)]
        for tree in self.trees:
            tree.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.newest_keys = self.newest_keys[rows.to("cpu")]
        self.trees = [copy.deepcopy(self.trees[row]) for row in rows.tolist()]

    @property
    def nbytes(self) -> int:
        return sum(tree.nbytes for tree in self.trees)
