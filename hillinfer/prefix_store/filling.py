"""Fill a cache with KV computed earlier, as a prefill would leave it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise, zip_longest

import torch

from hillinfer.cache import TieredCache
from hillinfer.errors import UsageError
from hillinfer.models.support import Support


def check_whole(support: Support) -> None:
    """UsageError if records do not hold all that the layers keep."""
    if support.more or len(support.tiered) < support.layers:
        raise UsageError(
            "a session or a store holds the keys and values of all tokens, and layers of this model keep a window or "
            "a state; prefill again, without one"
        )


def fill(
    cache: TieredCache, read: Callable[[int, int, int], torch.Tensor], pieces: list[int], device: torch.device
) -> None:
    """Append saved records to an empty cache, to the bit as a prefill in chunks of `pieces` tokens would.

    read(layer, start, end)  verified records (1, end - start, 2, Hkv, D); a thread calls it one read ahead
    """
    reads = [(layer, *span) for span in pairwise(accumulate(pieces, initial=0)) for layer in range(len(cache.layers))]
    with ThreadPoolExecutor(1, "hillinfer-open") as pool:
        pending = pool.submit(read, *reads[0])
        for (layer, *_), following in zip_longest(reads, reads[1:]):
            records = pending.result().to(device)
            if following:
                pending = pool.submit(read, *following)
            cache.layers[layer].fill(*records.permute(2, 0, 3, 1, 4), records)
