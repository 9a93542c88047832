"""What a model's attention looks like while it answers: how few keys carry the mass, sinks, what steps share."""

from collections import defaultdict

import numpy as np

from hillinfer.evaluator.policy import Policy, Step


class AttentionStats(Policy):
    """Attends to everything and keeps, for every layer and head, statistics of the exact weights.

    One instance serves one layer; give a class made by `watch` to `TieredCache`, which makes them all.
    """

    needs_codes = False
    kept: dict[str, dict[int, list[np.ndarray]]]

    def select(self, step: Step) -> None:
        weights = step.weights()  # (H, n)
        ordered = -np.sort(-weights, axis=1)
        enough = (np.cumsum(ordered, 1) < 0.95).sum(1) + 1
        tenth = np.zeros(weights.shape, bool)
        np.put_along_axis(tenth, np.argsort(-weights, axis=1)[:, : max(1, step.n // 10)], True, 1)
        self.kept["keys_for_95"][step.layer].append(enough / step.n)
        self.kept["sink_mass"][step.layer].append(weights[:, :4].sum(1))
        if (before := getattr(self, "before", None)) is not None and before.shape[1] == step.n - 1:
            shared = (before & tenth[:, :-1]).sum(1) / np.maximum(1, before.sum(1))
            self.kept["step_overlap"][step.layer].append(shared)
        self.before = tenth


def watch() -> type[AttentionStats]:
    """A policy class whose instances share one record, `kept[statistic][layer]`: a list of (H,) arrays, one a step."""
    return type("Watch", (AttentionStats,), {"kept": defaultdict(lambda: defaultdict(list))})


def summary(policy: type[AttentionStats]) -> dict[str, np.ndarray]:
    """Means over the steps: statistic -> (layers, H). `keys_for_95` is a share of the cached tokens."""
    return {
        name: np.stack([np.mean(steps, 0) for _, steps in sorted(layers.items())])
        for name, layers in policy.kept.items()
    }
