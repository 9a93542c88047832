"""A tree of boxes over a sequence's keys, searched from the top (LeoAM).

A parent's box holds its children's, so a subtree whose bound is too low is pruned whole.
"""

import numpy as np
import torch

from hillinfer import native
from hillinfer.evaluator.boxes import EMPTY, bounds, sortable, widen
from hillinfer.evaluator.topk import merge_heads
from hillinfer.growable import Growable

SIZES = (128, 32, 8, 2)  # tokens of the largest chunk, a page, to those of the smallest; the paper leaves them open
FAN, PAGE, LEAF = 4, SIZES[0], SIZES[-1]  # a page's nodes are numbered as in a heap: 4i+1 to 4i+4 are the parts of i
LEVEL = [slice((FAN**i - 1) // (FAN - 1), (FAN ** (i + 1) - 1) // (FAN - 1)) for i in range(len(SIZES))]
LEAVES, NODES = LEVEL[-1].start, LEVEL[-1].stop
SIZE = np.repeat(SIZES, [level.stop - level.start for level in LEVEL])  # tokens of each node
START = np.concatenate([np.arange(0, PAGE, size) for size in SIZES])  # its first token in the page
UPWARDS = list(zip(LEVEL[-2::-1], LEVEL[:0:-1], strict=True))  # (whole, parts), from the leaves' parents to the page
SLACK = 0.5  # of what ranks the smallest chunks: bounds of single heads are loose (docs/experiments.md)
PATIENCE = 2  # steps that all parts of a chunk must go unchosen before they are merged
BLOCK = (
    256  # boxes in float32 at a time: more leave the cache, and memory fresh from the system costs more than they do
)
REGRET = 16  # steps that a merge is put off after one that was undone for nothing


def encode(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Full pages (p, NODES, Hkv, 2, D) as int8 of the same shape, rounded outwards, and their scales (p, Hkv, 1, D)."""
    scale = boxes[:, 0].abs().amax(2, keepdim=True).clamp(min=1e-30) / 126  # the page's own box is the widest
    codes = boxes / scale[:, None]
    codes[..., 0, :] = torch.ceil(codes[..., 0, :] + 1e-3)  # the margin covers the rounding of the division
    codes[..., 1, :] = torch.floor(codes[..., 1, :] - 1e-3)
    return codes.clamp_(-127, 127).to(torch.int8), scale


class ChunkTree:
    """One sequence's keys in one layer: pages of PAGE tokens, each a binary tree of boxes, and a cut through all trees.

    The cut is where a search begins: merged chunks over attention deserts, split ones where members were chosen. It
    decides only what a search costs, never what it finds. Full pages are int8 in `pages`; the page that still grows is
    float32 and here, as are the boxes of whole pages.
    """

    def __init__(self, kv_heads: int, head_dim: int, pages):
        self.n, self.full, self.pages = 0, 0, pages
        self.shape = (NODES, kv_heads, 2, head_dim)
        self.tail = self._no_keys()
        self.tops = Growable((0, kv_heads, 2, head_dim), 0, torch.int8)
        self.scales = Growable((0, kv_heads, 1, head_dim), 0, torch.float32)
        self.cut = np.zeros((0, NODES), bool)
        self.cold = np.zeros((0, NODES), np.int8)  # steps for which a node of the cut went unchosen

    def append(self, keys: torch.Tensor) -> None:
        """New keys (Hkv, n, D) float32."""
        while keys.shape[1]:
            at, pages = self.n - self.full * PAGE, keys.shape[1] // PAGE
            if at == 0 and pages:  # whole pages at once: leaves, then parents
                leaves = keys[:, : pages * PAGE].unflatten(1, (-1, LEAF))
                boxes = self.tail.new_empty(pages, *self.tail.shape)
                boxes[:, LEAVES:, :, 0] = leaves.amax(2).transpose(0, 1).unflatten(0, (pages, -1))
                boxes[:, LEAVES:, :, 1] = leaves.amin(2).transpose(0, 1).unflatten(0, (pages, -1))
                self._store(_raise(boxes))
                took = pages * PAGE
            else:
                took = min(PAGE - at, keys.shape[1])
                places = torch.arange(at, at + took)
                path = torch.cat([level.start + places // size for level, size in zip(LEVEL, SIZES, strict=True)])
                widen(self.tail, path, keys[:, :took].repeat(1, len(SIZES), 1))
            self.n, keys = self.n + took, keys[:, took:]
            if self.n - self.full * PAGE == PAGE:
                self._store(self.tail[None])
                self.tail = self._no_keys()
        grown = -(-self.n // PAGE) - len(self.cut)
        if grown > 0:
            self.cut = np.concatenate((self.cut, np.zeros((grown, NODES), bool)))
            self.cold = np.concatenate((self.cold, np.zeros((grown, NODES), np.int8)))
            self.cut[-grown:, 0] = True

    def search(
        self, query: torch.Tensor, k: int, first: int, last: int, learn: bool = True, floor: torch.Tensor | None = None
    ) -> tuple[np.ndarray, int]:
        """The k best leaves that hold one of the tokens first..last-1, heads taking turns (`merge_heads`).

        query (Hkv, G, D). Returns the leaves' first tokens, ascending, and how many boxes were evaluated. The same
        leaves as an evaluation of all would give: a node is opened for as long as its bound is among the k best, and
        no leaf's estimate is above the bounds of what it is part of.
        floor (Hkv, G), if given: what cannot reach it for any query head is a desert, and neither opened nor chosen.
        """
        page, node = np.nonzero(self.cut)
        page, node = _overlapping(page, node, first, last)
        evaluated = len(page)
        page, node, score = self._score(page, node, query, floor)
        opened = []
        while True:
            order = np.argsort(page * PAGE + START[node], kind="stable")
            page, node, score = page[order], node[order], score[:, order]
            best = merge_heads(score, k)
            inner = best[node[best] < LEAVES]
            if not len(inner):
                break
            opened.append((page[inner], node[inner]))
            below = _overlapping(page[inner].repeat(FAN), _parts(node[inner]).ravel(), first, last)
            evaluated += len(below[0])
            rest = np.ones(len(page), bool)
            rest[inner] = False
            below = self._score(*below, query, floor)
            page, node = np.append(page[rest], below[0]), np.append(node[rest], below[1])
            score = np.concatenate((score[:, rest], below[2]), 1)
        if learn:
            self._learn(opened, page[best], node[best])
        return page[best] * PAGE + START[node[best]], evaluated

    def _learn(self, opened: list, page: np.ndarray, node: np.ndarray) -> None:
        """Move the cut: split what was opened, merge halves that go unchosen. (page, node) are the chosen leaves."""
        chosen = np.zeros_like(self.cut)
        chosen[page, node] = True
        for whole, parts in UPWARDS:
            chosen[:, whole] = chosen[:, parts].reshape(len(chosen), -1, FAN).any(2)
        for where in opened:
            self.cut[where] = False
            below = where[0][:, None], _parts(where[1])
            self.cut[below] = True
            self.cold[below] = np.where(chosen[where], 0, -REGRET)[
                :, None
            ]  # opened in vain: leave it split for a while
        self.cold += self.cut & (self.cold < 100)
        self.cold[chosen] = 0
        for whole, parts in UPWARDS:
            ready = (self.cut & (self.cold > PATIENCE))[:, parts].reshape(len(chosen), -1, FAN).all(2)
            self.cut[:, parts] &= ~ready.repeat(FAN, 1)
            self.cut[:, whole] |= ready
            self.cold[:, whole][ready] = 0

    def _score(
        self, page: np.ndarray, node: np.ndarray, query: torch.Tensor, floor: torch.Tensor | None = None
    ) -> tuple:
        """Those of the nodes that reach the floor, and their bounds (leaves: estimates) in sortable form, (Hkv, m)."""
        leaf = node >= LEAVES
        if native.available() and query.shape[2] <= native.MAX_DIM:
            score, reach = self._located(page, node, leaf, query, floor)
        else:
            every = query.new_empty(len(query), len(page), query.shape[1])
            for start in range(0, len(page), BLOCK):
                part = slice(start, start + BLOCK)
                every[:, part] = _judge(self.boxes(page[part], node[part]), leaf[part], query)
            score, reach = every.amax(2).numpy(), None if floor is None else _reach(every, floor)
        if floor is not None:
            page, node, score = page[reach], node[reach], score[:, reach]
        return page, node, sortable(score)

    def _located(self, page: np.ndarray, node: np.ndarray, leaf: np.ndarray, query: torch.Tensor, floor) -> tuple:
        """Where the boxes lie, by the kernel: the best of each group (Hkv, m), and which nodes reach the floor."""
        score, reach = np.empty((len(query), len(page)), np.float32), np.empty(len(page), bool)
        grows = page == self.full
        if grows.any():
            every = _judge(self.tail[torch.from_numpy(node[grows])], leaf[grows], query)
            score[:, grows], reach[grows] = every.amax(2).numpy(), True if floor is None else _reach(every, floor)
        if not grows.all():
            page, node, leaf = page[~grows], node[~grows], leaf[~grows]
            tops, scales = self.tops.data, self.scales.data
            boxes, inner = tops.data_ptr() + page * tops.stride(0), np.flatnonzero(node)
            at = scales.data_ptr() + page * scales.stride(0) * scales.element_size()
            todo, known = np.flatnonzero(~grows), np.flatnonzero(node == 0)  # a page's own box is in memory
            for which, data, index in self.pages.groups(page[inner]):
                which = inner[which]
                boxes[which] = data.data_ptr() + index * data.stride(0) + node[which] * data.stride(1)
                known = np.append(known, which)
                judged = native.bounds(
                    query, boxes[known], at[known], leaf[known], SLACK, floor, torch.get_num_threads()
                )
                score[:, todo[known]], reach[todo[known]] = judged
                known = known[:0]
        return score, reach

    def boxes(self, page: np.ndarray, node: np.ndarray) -> torch.Tensor:
        """Of these nodes, (m, Hkv, 2, D) float32."""
        boxes = self.tail.new_empty(len(page), *self.tail.shape[1:])
        grows = page == self.full
        boxes[torch.from_numpy(grows)] = self.tail[torch.from_numpy(node[grows])]
        for mask, source in ((~grows & (node == 0), None), (~grows & (node > 0), self.pages)):
            if mask.any():
                at = torch.from_numpy(page[mask])
                codes = self.tops.view()[at] if source is None else source.take(page[mask], node[mask])
                boxes[torch.from_numpy(mask)] = codes.float().mul_(self.scales.view()[at])  # a mixed product: 4x slower
        return boxes

    def _no_keys(self) -> torch.Tensor:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            return EMPTY.expand(self.shape).clone()

    def _store(self, boxes: torch.Tensor) -> None:
        """Full pages (p, NODES, Hkv, 2, D) float32."""
        codes, scales = encode(boxes)
        self.pages.append(codes)
        self.tops.append(codes[:, 0])
        self.scales.append(scales)
        self.full += len(codes)

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on. Boxes of a chunk that n cuts through stay as wide as they were: still bounds."""
        full = n // PAGE
        if full < self.full:
            codes = self.pages.take(np.full(NODES, full), np.arange(NODES))
            self.tail[:] = codes * self.scales.view()[full]
            self.pages.truncate(full)
            self.tops.truncate(full)
            self.scales.truncate(full)
        self.n, self.full = n, full
        self.tail[LEAVES + -(-(n - full * PAGE) // LEAF) :] = EMPTY
        _raise(self.tail[None])
        pages = -(-n // PAGE)
        self.cut, self.cold = self.cut[:pages].copy(), self.cold[:pages].copy()
        if n % PAGE:
            self.cut[-1], self.cold[-1] = np.arange(NODES) == 0, 0

    @property
    def nbytes(self) -> int:
        """In memory."""
        held = self.tops.view().nbytes + self.scales.view().nbytes + self.tail.nbytes
        return held + self.pages.nbytes + self.cut.nbytes + self.cold.nbytes


def _judge(boxes: torch.Tensor, leaf: np.ndarray, query: torch.Tensor) -> torch.Tensor:
    """Bounds of boxes, and estimates of the smallest chunks': (Hkv, m, G)."""
    score, leaf = query.new_empty(len(query), len(boxes), query.shape[1]), torch.from_numpy(leaf)
    score[:, ~leaf], score[:, leaf] = bounds(boxes[~leaf], query), bounds(boxes[leaf], query, SLACK)
    return score


def _reach(score: torch.Tensor, floor: torch.Tensor) -> np.ndarray:
    """Which nodes' scores (Hkv, m, G) reach the floor (Hkv, G) for some query head."""
    return (score >= floor[:, None]).any(2).any(0).numpy()


def _raise(boxes: torch.Tensor) -> torch.Tensor:
    """Fill in the parents' boxes of pages (p, NODES, Hkv, 2, D) from the leaves', in place."""
    for whole, parts in UPWARDS:
        groups = boxes[:, parts].unflatten(1, (-1, FAN))
        boxes[:, whole, :, 0] = groups[..., 0, :].amax(2)
        boxes[:, whole, :, 1] = groups[..., 1, :].amin(2)
    return boxes


def _parts(node: np.ndarray) -> np.ndarray:
    """(m,) -> (m, FAN)."""
    return FAN * node[:, None] + np.arange(1, FAN + 1)


def _overlapping(page: np.ndarray, node: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of the nodes that hold one of the tokens first..last-1."""
    start = page * PAGE + START[node]
    inside = (start < last) & (start + SIZE[node] > first)
    return page[inside], node[inside]
