"""Random tokens and the newest one: the baseline of any selection. Seeded by layer and step for reproducibility."""

import numpy as np

from hillinfer.evaluator.policy import Policy, Step


class Random(Policy):
    """Uniformly random tokens."""

    needs_codes = False

    def select(self, step: Step) -> np.ndarray:
        rng = np.random.default_rng((step.layer, step.step))
        return np.append(np.sort(rng.choice(step.n - 1, step.budget - 1, replace=False)), step.n - 1)
