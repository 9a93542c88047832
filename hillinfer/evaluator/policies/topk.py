"""The window and the tokens whose coded keys rank highest (HillInfer section 1.3)."""

import numpy as np
import torch

from hillinfer.evaluator.policy import Policy, Step


class TopK(Policy):
    """The window and the tokens that some head gives most, by their key codes."""

    per_head = True
    can_speculate = True

    def select(self, step: Step) -> np.ndarray | None:
        if step.budget >= step.n:
            return None
        return step.best(torch.from_numpy(step.scores())[None])[0].numpy()

    def choose(self, step: Step) -> tuple[torch.Tensor, None] | None:
        return None if step.budget >= step.n else (step.best(step.scores()), None)
