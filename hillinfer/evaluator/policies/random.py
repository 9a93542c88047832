"""Random tokens and the newest one: what a selection must beat. Seeded by layer and step, so that runs repeat."""

import numpy as np

from hillinfer.evaluator.policy import Policy, Step


class Random(Policy):
    """Uniformly random tokens."""

    needs_codes = False

    def select(self, step: Step) -> np.ndarray:
        rng = np.random.default_rng((step.layer, step.step))
        return np.append(np.sort(rng.choice(step.n - 1, step.budget - 1, replace=False)), step.n - 1)
