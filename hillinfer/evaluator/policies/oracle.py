"""The tokens that exact attention weighs most: the best any selection of that size can do. It reads every key."""

import numpy as np

from hillinfer.evaluator.policy import Policy, Step


class Oracle(Policy):
    """True top-k: a token counts as much as the query head that wants it most gives it."""

    needs_codes = False

    def select(self, step: Step) -> np.ndarray | None:
        if step.budget >= step.n:
            return None
        mass = step.weights().max(0)
        return np.sort(np.argpartition(-mass, step.budget - 1)[: step.budget])
