"""Capacity of the hot pool in host memory."""

from hillinfer.config import Settings


def pool_tokens(settings: Settings, n: int, token_bytes: int, budget: int | None, share: float | None = None) -> int:
    """Capacity in tokens, per layer and sequence, at n cached tokens.

    HKM keeps alpha*N by recency and alpha*N by frequency, unless a `share` of the tokens (APP's balance) or a budget is
    given. Never less than the pinned tokens, nor more than `budget` bytes at `token_bytes` per token, summed over
    layers and sequences.
    """
    if share is None:
        share = min(1.0, 2 * settings.alpha) if budget is None else 1.0
    tokens = min(n, max(int(share * n), int(settings.pinned * n)) + 1)
    return tokens if budget is None else min(tokens, budget // token_bytes)
