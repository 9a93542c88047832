"""The tokens with the highest exact attention weights: an upper bound on selection quality. It reads every key."""

import numpy as np

from hillinfer.evaluator.policy import Policy, Step


class Oracle(Policy):
    """True top-k by the maximum attention weight over the query heads."""

    needs_codes = False
    per_head = fills = True

    def select(self, step: Step) -> np.ndarray:
        mass = step.weights().max(0)
        return np.sort(np.argpartition(-mass, step.budget - 1)[: step.budget])
