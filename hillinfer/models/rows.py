"""One decode for many ways: row i of a batch steps the i-th of several caches, and the weights are read once for all.

The caches hold the same tokens and may belong to any systems. From here on each row goes its own way: its tokens, its
selection, its store. Outputs equal those of a decode alone up to the rounding of a batched matrix product.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache

from hillinfer.errors import UsageError
from hillinfer.layer import Layer
from hillinfer.models.layers import TieredLayer


class RowsLayer(Layer):
    """One decoder layer of several caches, for steps of one token."""

    def __init__(self, layers: list[TieredLayer], rows: "Rows"):
        self.layers, self.rows = layers, rows

    @property
    def n(self) -> int:
        return max(layer.layer.n for layer in self.layers)

    def append(self, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor | None = None) -> None:
        self.new = keys, values  # each row's worker appends them before it attends

    def attend(self, query, mask, scaling, softcap=0.0, sinks=None) -> torch.Tensor:
        def step(row: int) -> torch.Tensor:
            own, layer = slice(row, row + 1), self.layers[row].seen_from(query.device)
            layer.append(*(part[own] for part in self.new))
            return layer.attend(query[own], None if mask is None else mask[own], scaling, softcap, sinks)

        done = self.rows.each(step)
        shape = next(iter(done.values())).shape[1:]
        out = query.new_zeros(len(query), *shape)
        for row, found in done.items():
            out[row] = found[0]
        return out


class Rows(Cache):
    """The caches of several ways as one cache of a batch. What they do not tier (a sliding window) is kept here.

    ended  (B,) bool; rows that take no further part, and whose caches stay as they are
    """

    def __init__(self, caches: Sequence[Cache]):
        self.ended = torch.zeros(len(caches), dtype=torch.bool, device="cpu")
        threads = torch.get_num_threads()  # that a matrix product uses; a row's small operations gain from none but one
        self.workers = [
            ThreadPoolExecutor(1, "hillinfer-row", torch.set_num_threads, (1,))
            for _ in range(min(threads, len(caches)))
        ]
        layers = []
        for index, layer in enumerate(caches[0].layers):
            if isinstance(layer, TieredLayer):
                layers.append(TieredLayer(RowsLayer([cache.layers[index] for cache in caches], self)))
                layers[-1].crossing = layers[-1].layer  # each row crosses for itself
            else:
                layers.append(copy.deepcopy(layer))
                layers[-1].reorder_cache(torch.zeros(len(caches), dtype=torch.long, device="cpu"))
        super().__init__(layers=layers)

    def each(self, step: Callable[[int], torch.Tensor]) -> dict[int, torch.Tensor]:
        """`step` of each row that has not ended. A row keeps its worker: a step of a cache belongs to one thread."""
        ended, inference = self.ended.tolist(), torch.is_inference_mode_enabled()

        def work(first: int) -> dict[int, torch.Tensor]:
            with torch.inference_mode(inference), torch.no_grad():
                return {row: step(row) for row in range(first, len(ended), len(self.workers)) if not ended[row]}

        running = [worker.submit(work, first) for first, worker in enumerate(self.workers)]
        return {row: out for future in running for row, out in future.result().items()}


@contextmanager
def as_batch(caches: Sequence[Cache]) -> Iterator[Cache]:
    """The only cache itself, or all as rows of one batch. UsageError where no selection can serve the attention."""
    if len(caches) == 1:
        yield caches[0]
        return
    if caches[0].support.exact:
        raise UsageError("the attention of this model takes the keys of one cache: decode one at a time")
    rows = Rows(caches)
    try:
        yield rows
    finally:
        for worker in rows.workers:
            worker.shutdown()
