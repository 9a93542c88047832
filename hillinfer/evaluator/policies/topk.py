"""The window and the tokens whose coded keys rank highest (HillInfer section 1.3)."""

import numpy as np
import torch

from hillinfer.evaluator.policy import Policy, Step
from hillinfer.evaluator.topk import topk


class TopK(Policy):
    """The window and the tokens that some head gives most, by their key codes."""

    per_head = can_speculate = fills = True

    def select(self, step: Step) -> np.ndarray:
        first = min(step.sinks, step.n)
        last = max(first, step.n - step.recent)  # candidates are first..last-1
        chosen = first + np.sort(topk(step.scores()[first:last], step.budget - first - step.n + last))
        return np.concatenate((np.arange(first), chosen, np.arange(last, step.n)))

    def choose(self, step: Step) -> tuple[torch.Tensor, None]:
        return step.best(step.scores()), None
