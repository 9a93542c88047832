"""What a policy is given, and what it must answer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Step:
    """One decode step of one layer and sequence, as a policy sees it."""

    n: int  # cached tokens, the newest included
    budget: int  # how many of them may be attended to
    sinks: int  # first tokens kept on the device
    recent: int  # last tokens kept on the device
    layer: int
    step: int
    scores: Callable[[], np.ndarray]  # INT8 scores of all keys, (Hkv, n) int32; padding has the lowest. Costs a scan
    weights: Callable[[], np.ndarray]  # exact attention weights (H, n) float32. Reads all KV: for study, not for speed

    def near(self) -> np.ndarray:
        """Positions that the device holds: sinks and recent tokens. They cost no transfer."""
        return np.unique(
            np.concatenate((np.arange(min(self.sinks, self.n)), np.arange(max(0, self.n - self.recent), self.n)))
        )


class Policy:
    """Chooses which tokens a decode step attends to. Subclass, write `select`, add one line to `policies`."""

    selects = True  # False: every step attends to everything, and `select` is not asked
    needs_codes = True  # whether `scores` is used; without it no key codes are built
    can_speculate = False  # whether `select` may be called with a predicted query as well: it must keep no state

    def select(self, step: Step) -> np.ndarray | None:
        """Sorted, distinct positions, at most `step.budget` of them; None attends to everything."""
        raise NotImplementedError
