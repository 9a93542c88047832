"""The device window and the tokens whose INT8 scores are highest (HillInfer section 1.3; exact top-k of coded keys)."""

import numpy as np

from hillinfer.evaluator.policy import Policy, Step
from hillinfer.evaluator.topk import merge_heads


class TopK(Policy):
    """The device window and the tokens whose key codes score highest."""

    can_speculate = True

    def select(self, step: Step) -> np.ndarray | None:
        if step.budget >= step.n:
            return None
        near = step.near()[-step.budget :]
        scores = step.scores()
        far = np.ones(step.n, bool)
        far[near] = False
        candidates = np.flatnonzero(far)
        chosen = candidates[merge_heads(scores[:, candidates], step.budget - len(near))]
        return np.sort(np.concatenate((near, chosen)))
