"""Attention sinks and a recent window (StreamingLLM, arXiv 2309.17453).

The paper renumbers positions within its cache; here, as in later comparisons, keys keep their original positions.
"""

import numpy as np

from hillinfer.evaluator.policy import Policy, Step


class Streaming(Policy):
    """Attention sinks and a recent window."""

    needs_codes = False

    def select(self, step: Step) -> np.ndarray:
        sinks = min(step.sinks, step.budget)
        return np.union1d(np.arange(min(sinks, step.n)), np.arange(max(0, step.n - step.budget + sinks), step.n))
