"""A tree of boxes over a sequence's keys, searched from the top (LeoAM).

A parent's box contains its children's boxes, so that a subtree with a low bound is pruned as a whole. The nodes of all
pages are numbered consecutively: node id = page * NODES + node of the page.
"""

from collections.abc import Iterator

import numpy as np
import torch

from hillinfer import native
from hillinfer.evaluator.topk import topk
from hillinfer.growable import Growable
from hillinfer.systems.boxes import EMPTY, bounds, sortable, widen
from hillinfer.systems.leoam.pages import Pages

SIZES = (128, 32, 8, 2)  # tokens per chunk by level, from a page to a leaf; the paper leaves them open
FAN, PAGE, LEAF = 4, SIZES[0], SIZES[-1]  # nodes of a page are numbered as in a heap: 4i+1 to 4i+4 are children of i
LEVEL = [slice((FAN**i - 1) // (FAN - 1), (FAN ** (i + 1) - 1) // (FAN - 1)) for i in range(len(SIZES))]
LEAVES, NODES = LEVEL[-1].start, LEVEL[-1].stop
SIZE = np.repeat(SIZES, [level.stop - level.start for level in LEVEL])  # tokens of each node
START = np.concatenate([np.arange(0, PAGE, size) for size in SIZES])  # first token of each node in its page
UPWARDS = list(zip(LEVEL[-2::-1], LEVEL[:0:-1], strict=True))  # (parents, children) by level, from the leaves up
SLACK = 0.5  # leaves are ranked by an estimate: bounds of single heads are loose (docs/experiments.md)
PATIENCE = 2  # steps without a chosen child after which a chunk is merged
REGRET = 16  # steps by which a merge is delayed if the last split was in vain
BATCH = 256  # boxes converted to float32 at a time: more would leave the processor's cache


def encode(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Full pages (p, NODES, Hkv, 2, D) as int8 of the same shape, rounded outwards, and their scales (p, Hkv, 1, D)."""
    scale = boxes[:, 0].abs().amax(2, keepdim=True).clamp(min=1e-30) / 126  # the root's box is the widest
    codes = boxes / scale[:, None]
    codes[..., 0, :] = torch.ceil(codes[..., 0, :] + 1e-3)  # the margin covers the rounding error of the division
    codes[..., 1, :] = torch.floor(codes[..., 1, :] - 1e-3)
    return codes.clamp_(-127, 127).to(torch.int8), scale


class ChunkTree:
    """The keys of one sequence and layer: pages of PAGE tokens, each a tree of boxes, and a cut through all trees.

    A search starts at the cut: merged chunks over attention deserts, split chunks where tokens were chosen. The cut
    affects the cost of a search, never its result. Full pages are int8 in `pages`; their roots and the growing page
    (`tail`, float32) are always in memory.
    """

    def __init__(self, kv_heads: int, head_dim: int, pages: Pages):
        self.n, self.pages = 0, pages
        self.shape = (NODES, kv_heads, 2, head_dim)
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            self.tail = EMPTY.expand(self.shape).clone()
        self.roots = Growable((0, kv_heads, 2, head_dim), 0, torch.int8)
        self.scales = Growable((0, kv_heads, 1, head_dim), 0, torch.float32)
        self.cut = np.zeros((0, NODES), bool)
        self.idle = np.zeros((0, NODES), np.int8)  # steps for which a node of the cut was not chosen

    @property
    def full(self) -> int:
        """Number of full pages."""
        return self.n // PAGE

    def append(self, keys: torch.Tensor) -> None:
        """Add keys (Hkv, n, D) float32."""
        at, pages = self.n % PAGE, self.tail[None]
        self.n += keys.shape[1]
        full = (at + keys.shape[1]) // PAGE
        if full:
            pages = self.tail.new_empty(full + 1, *self.shape)
        leaves = EMPTY.expand(len(pages) * (NODES - LEAVES), *self.shape[1:]).clone()
        leaves[: NODES - LEAVES] = self.tail[LEAVES:]
        widen(leaves, at, LEAF, keys)
        pages[:, LEAVES:] = leaves.unflatten(0, (len(pages), -1))
        _fill_parents(pages)
        if full:
            self._store(pages[:full])
            self.tail[:] = pages[full]
        if (grown := -(-self.n // PAGE) - len(self.cut)) > 0:
            self.cut, self.idle = (np.pad(array, ((0, grown), (0, 0))) for array in (self.cut, self.idle))
            self.cut[-grown:, 0] = True

    def search(
        self, query: torch.Tensor, k: int, first: int, last: int, learn: bool = True, floor: torch.Tensor | None = None
    ) -> tuple[np.ndarray, int]:
        """The k best leaves that overlap tokens first..last-1, over all heads (`nearest`).

        query  (Hkv, G, D)
        learn  adapt the cut to the result
        floor  (Hkv, G), optional: a node below it for every query head is a desert, neither opened nor chosen

        Returns the first tokens of the leaves, ascending, and the number of boxes evaluated. The leaves are those that
        an evaluation of all leaves would choose: a node is opened while its bound is among the k best or some head's
        best, and no leaf's estimate exceeds the bound of an ancestor.
        """
        nodes = overlapping(np.flatnonzero(self.cut), first, last)
        evaluated = len(nodes)
        nodes, score = self.scores(nodes, query, floor)
        opened = []
        while True:
            order = np.argsort(first_token(nodes), kind="stable")
            nodes, score = nodes[order], score[:, order]
            best = nearest(score, max(k, len(score)) if k else 0)
            inner = best[nodes[best] % NODES < LEAVES]
            if not len(inner):
                best = nearest(score, k)
                break
            opened.append(nodes[inner])
            children = overlapping(_children(nodes[inner]).ravel(), first, last)
            evaluated += len(children)
            children, more = self.scores(children, query, floor)
            nodes = np.append(np.delete(nodes, inner), children)
            score = np.concatenate((np.delete(score, inner, 1), more), 1)
        if learn:
            self._move_cut(opened, nodes[best])
        return first_token(nodes[best]), evaluated

    def _move_cut(self, opened: list[np.ndarray], leaves: np.ndarray) -> None:
        """Split the nodes that were opened; merge siblings that go unchosen. `leaves` are the chosen ones."""
        chosen = np.zeros_like(self.cut)
        chosen.reshape(-1)[leaves] = True
        for parents, children in UPWARDS:
            chosen[:, parents] = chosen[:, children].reshape(len(chosen), -1, FAN).any(2)
        cut, idle = self.cut.reshape(-1), self.idle.reshape(-1)  # views, by node id
        for nodes in opened:
            children = _children(nodes)
            cut[nodes], cut[children] = False, True
            idle[children] = np.where(chosen.reshape(-1)[nodes], 0, -REGRET)[:, None]
        self.idle += self.cut & (self.idle < 100)
        self.idle[chosen] = 0
        for parents, children in UPWARDS:
            merged = (self.cut & (self.idle > PATIENCE))[:, children].reshape(len(chosen), -1, FAN).all(2)
            self.cut[:, children] &= ~merged.repeat(FAN, 1)
            self.cut[:, parents] |= merged
            self.idle[:, parents][merged] = 0

    def scores(
        self, nodes: np.ndarray, query: torch.Tensor, floor: torch.Tensor | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nodes (m,) that reach the floor, and their bounds (leaves: estimates), float32 (Hkv*G, m)."""
        score = np.empty((query.shape[0] * query.shape[1], len(nodes)), np.float32)
        compiled = native.available() and query.shape[2] <= native.MAX_DIM
        for index, data, places in self._locate(nodes):
            page, leaf = nodes[index] // NODES, nodes[index] % NODES >= LEAVES
            if compiled and data is not self.tail:
                scales = self.scales.data
                boxes = data.data_ptr() + places * data.stride(0)
                scale = scales.data_ptr() + page * scales.stride(0) * scales.element_size()
                score[:, index] = native.bounds(query, boxes, scale, leaf, SLACK, torch.get_num_threads())
                continue
            for start in range(0, len(index), BATCH):
                part = slice(start, start + BATCH)
                boxes = self._decode(data, places[part], page[part])
                score[:, index[part]] = _judge(boxes, leaf[part], query)
        if floor is not None:
            reach = (score >= floor.reshape(-1, 1).numpy()).any(0)
            nodes, score = nodes[reach], score[:, reach]
        return nodes, score

    def boxes(self, nodes: np.ndarray) -> torch.Tensor:
        """Boxes of these nodes, (m, Hkv, 2, D) float32."""
        boxes = self.tail.new_empty(len(nodes), *self.shape[1:])
        for index, data, places in self._locate(nodes):
            boxes[torch.from_numpy(index)] = self._decode(data, places, nodes[index] // NODES)
        return boxes

    def _locate(self, nodes: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
        """Where the boxes are stored: (indices into nodes, data (x, Hkv, 2, D), their places in data)."""
        page, node = np.divmod(nodes, NODES)
        growing, root = page == self.full, node == 0
        if len(index := np.flatnonzero(growing)):
            yield index, self.tail, node[index]
        if len(index := np.flatnonzero(root & ~growing)):
            yield index, self.roots.data, page[index]
        if len(inner := np.flatnonzero(~(root | growing))):
            for index, data, place in self.pages.batches(page[inner]):
                index = inner[index]
                yield index, data.flatten(0, 1), place * NODES + node[index]

    def _decode(self, data: torch.Tensor, places: np.ndarray, page: np.ndarray) -> torch.Tensor:
        """Boxes at these places of `data`, of these pages, as float32 (m, Hkv, 2, D)."""
        boxes = data[torch.from_numpy(places)]
        if data is self.tail:
            return boxes
        return boxes.float().mul_(self.scales.view()[torch.from_numpy(page)])  # a mixed product is four times slower

    def _store(self, boxes: torch.Tensor) -> None:
        """Add full pages (p, NODES, Hkv, 2, D) float32."""
        codes, scales = encode(boxes)
        self.pages.append(codes)
        self.roots.append(codes[:, 0])
        self.scales.append(scales)

    def truncate(self, n: int) -> None:
        """Forget all tokens from n on. Boxes of a chunk that n cuts through keep their width: they are still bounds."""
        full = n // PAGE
        if full < self.full:
            self.tail[:] = self.boxes(full * NODES + np.arange(NODES))
            for part in (self.pages, self.roots, self.scales):
                part.truncate(full)
        self.n = n
        self.tail[LEAVES + -(-(n % PAGE) // LEAF) :] = EMPTY
        _fill_parents(self.tail[None])
        pages = -(-n // PAGE)
        self.cut, self.idle = self.cut[:pages].copy(), self.idle[:pages].copy()
        if n % PAGE:
            self.cut[-1], self.idle[-1] = np.arange(NODES) == 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        parts = self.roots.view(), self.scales.view(), self.tail, self.pages, self.cut, self.idle
        return sum(part.nbytes for part in parts)


def distance(scores: np.ndarray) -> np.ndarray:
    """How far a box lies below some query head's best: the highest of scores (H, m) less each head's own highest, (m,).

    It makes heads comparable where few boxes have a logsumexp.
    """
    return (scores - scores.max(1, keepdims=True, initial=-np.inf)).max(0)


def nearest(scores: np.ndarray, k: int) -> np.ndarray:
    """The k boxes (ascending) of least `distance`, by float32 scores (H, m)."""
    return np.sort(topk(sortable(distance(scores)), k))


def _judge(boxes: torch.Tensor, leaf: np.ndarray, query: torch.Tensor) -> np.ndarray:
    """`native.bounds` in torch: (Hkv*G, m)."""
    score, leaf = query.new_empty(len(query), len(boxes), query.shape[1]), torch.from_numpy(leaf)
    score[:, ~leaf], score[:, leaf] = bounds(boxes[~leaf], query), bounds(boxes[leaf], query, SLACK)
    return score.transpose(1, 2).flatten(0, 1).numpy()


def _fill_parents(boxes: torch.Tensor) -> None:
    """Compute the parents' boxes of pages (p, NODES, Hkv, 2, D) from the leaves', in place."""
    for parents, children in UPWARDS:
        groups = boxes[:, children].unflatten(1, (-1, FAN))
        boxes[:, parents, :, 0] = groups[..., 0, :].amax(2)
        boxes[:, parents, :, 1] = groups[..., 1, :].amin(2)


def first_token(nodes: np.ndarray) -> np.ndarray:
    """First token of each node (m,)."""
    page, node = np.divmod(nodes, NODES)
    return page * PAGE + START[node]


def overlapping(nodes: np.ndarray, first: int, last: int) -> np.ndarray:
    """The nodes that contain one of the tokens first..last-1."""
    start = first_token(nodes)
    return nodes[(start < last) & (start + SIZE[nodes % NODES] > first)]


def _children(nodes: np.ndarray) -> np.ndarray:
    """(m,) -> (m, FAN)."""
    page, node = np.divmod(nodes, NODES)
    return (page * NODES + FAN * node)[:, None] + np.arange(1, FAN + 1)
