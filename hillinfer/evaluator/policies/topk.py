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
        first = min(step.sinks, step.n)
        last = max(first, step.n - step.recent)  # candidates are first..last-1
        chosen = first + merge_heads(step.scores()[:, first:last], step.budget - first - step.n + last)
        return np.concatenate((np.arange(first), chosen, np.arange(last, step.n)))
