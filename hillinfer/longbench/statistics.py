"""Confidence intervals and paired tests over samples grouped by task. Averages weigh tasks equally, not samples.

Seeded, and independent of the order in which results arrive.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # bootstrap (percentile, stratified by task) and random sign flips
SEED = 42


def interval(groups: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> tuple[float, float, float]:
    """Weighted mean of the groups' means (equal weights by default), and its 95 % bootstrap interval.

    The interval is NaN if a group has only one sample, because its spread is unknown. It has zero width if all samples
    agree.
    """
    rng = np.random.default_rng(SEED)
    weights = np.ones(len(groups)) / len(groups) if weights is None else weights
    drawn = [values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1) for values in groups]
    single = min(map(len, groups)) < 2
    low, high = (np.nan, np.nan) if single else np.percentile(np.dot(weights, drawn), (2.5, 97.5))
    return float(np.dot(weights, [values.mean() for values in groups])), float(low), float(high)


def paired(groups: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> tuple[float, float, float, float]:
    """Mean difference, its 95 % interval, and the two-sided p-value of a sign-flip permutation test.

    groups  paired differences, one per sample; under the null hypothesis, either sign is equally likely
    """
    rng = np.random.default_rng(SEED)
    mean, low, high = interval(groups, weights)
    weights = np.ones(len(groups)) / len(groups) if weights is None else weights
    flipped = [(rng.integers(0, 2, (RESAMPLES, len(v))) * 2 - 1) @ v / len(v) for v in groups]
    extreme = abs(np.dot(weights, flipped)) >= abs(mean) - 1e-12
    return mean, low, high, float((1 + extreme.sum()) / (1 + RESAMPLES))
