"""Evaluations and redundant reads of LeoAM's chunks by layer, against single tokens and fixed chunks of 16 and 64.

    python -m benchmarks.chunks --n 4
    python -m benchmarks.chunks --n 2 --misses

A token is important if it is outside the device window and has at least 1 % of some head's attention. A method reads
chunks, nearest to some head's best first, until it has 95 % of the important tokens; all others read are redundant.
"""

import argparse

import numpy as np
import pandas as pd

from hillinfer.assets import load_embedded, machine
from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.longbench.runner import ask
from hillinfer.longbench.synthetic import make_records
from hillinfer.systems.baselines import Quest
from hillinfer.systems.boxes import bounds
from hillinfer.systems.leoam.policy import LeoAM
from hillinfer.systems.leoam.tree import LEAF, LEAVES, NODES, distance, nearest

SEED, SHARE, COVER = 78, 0.01, 0.95
METHODS = {"tokens": 1, "leoam": LEAF, "chunks of 16": 16, "chunks of 64": 64}


class Study(LeoAM):
    """LeoAM, which also evaluates the reads of other chunk sizes. Adds rows of figures to `found`."""

    found: list = []

    def start(self, batch, kv_heads, head_dim):
        super().start(batch, kv_heads, head_dim)
        self.fixed = {}
        for name, size in METHODS.items():
            self.fixed[name] = type("Fixed", (Quest,), {"page": size})()
            self.fixed[name].start(batch, kv_heads, head_dim)

    def append(self, keys):
        super().append(keys)
        for policy in self.fixed.values():
            policy.append(keys)

    def truncate(self, n):
        super().truncate(n)
        for policy in self.fixed.values():
            policy.truncate(n)

    def select(self, step):
        picked = super().select(step)
        last = (step.n - step.recent) // 64 * 64  # whole chunks of every size
        weights = step.weights()[:, :last].max(0)
        weights[: step.sinks] = 0
        important = np.flatnonzero(weights >= SHARE)
        for name, size in METHODS.items():
            evaluated = step.notes["bounds"] if name == "leoam" else last // size
            row = {"layer": step.layer, "method": name, "cached": last, "evaluated": evaluated, "important": 0}
            if len(important):
                read = size * covering(self._scores(name, size, step, last), important // size)
                row |= {"important": len(important), "read": read, "redundant": 1 - COVER * len(important) / read}
            self.found.append(row)
        return picked

    def _scores(self, name: str, size: int, step, last: int) -> np.ndarray:
        query = step.grouped(self.kv_heads)
        if name == "leoam":  # as LeoAM stores them: full pages in INT8
            page, leaf = np.divmod(np.arange(last // LEAF), NODES - LEAVES)
            return self.trees[step.row].scores(page * NODES + LEAVES + leaf, query)[1]
        boxes = self.fixed[name].boxes.view()[step.row, : last // size]
        return bounds(boxes, query).transpose(1, 2).flatten(0, 1).numpy()


class Misses(Quest):
    """Full attention that records if chunks of each size and slack would have included a head's heaviest token."""

    found: list = []

    def start(self, *shape):
        self.fixed = [type("Fixed", (Quest,), {"page": size})() for size in (2, 4, 8, 16)]
        for policy in self.fixed:
            policy.start(*shape)

    def append(self, keys):
        for policy in self.fixed:
            policy.append(keys)

    def select(self, step):
        last = (step.n - step.recent) // 16 * 16
        weights = step.weights()[:, :last]
        best = weights.argmax(1)
        best = best[(weights.max(1) > 0.2) & (best >= step.sinks)]
        for policy in self.fixed if len(best) else ():
            boxes = policy.boxes.view()[step.row, : last // policy.page]
            for slack in (1.0, 0.5):
                score = bounds(boxes, step.grouped(policy.kv_heads), slack).transpose(1, 2).flatten(0, 1).numpy()
                chosen = nearest(score, (round(0.2 * step.n) - len(step.near())) // policy.page)
                missed = ~np.isin(best // policy.page, chosen)
                self.found.append({"size": policy.page, "slack": slack, "heads": len(best), "missed": missed.sum()})


def misses(task: str, tokens: int, n: int) -> pd.DataFrame:
    """Share of heads that miss a token with over 20 % of their attention, because alpha 0.2 skips its chunk."""
    model, tokenizer = load_embedded()
    Misses.found = []
    for record in make_records(task, tokens, n, SEED):
        with TieredCache(model.config, Misses, Settings(alpha=0.2)) as cache:
            ask(model, tokenizer, record, cache)
    sums = pd.DataFrame(Misses.found).groupby(["size", "slack"])[["heads", "missed"]].sum()
    return sums.assign(share=sums.missed / sums.heads)


def covering(scores: np.ndarray, wanted: np.ndarray) -> int:
    """Number of chunks read, in order of `distance` by scores (H, m), until COVER of the `wanted` (k,) are read."""
    turn = (-distance(scores)).argsort(kind="stable").argsort()
    needed = np.sort(turn[wanted])[int(np.ceil(COVER * len(wanted))) - 1]
    return int((turn <= needed).sum())


def measure(tasks: list[str], tokens: int, n: int, alpha: float) -> pd.DataFrame:
    """One row per layer and method: means over all decode steps with important tokens."""
    model, tokenizer = load_embedded()
    Study.found = []
    for task in tasks:
        for record in make_records(task, tokens, n, SEED):
            with TieredCache(model.config, Study, Settings(alpha=alpha)) as cache:
                ask(model, tokenizer, record, cache)
    frame = pd.DataFrame(Study.found)
    return frame.groupby(["layer", "method"], sort=False).mean().reset_index()


def table(frame: pd.DataFrame) -> str:
    """The frame as Markdown: evaluated, read and redundant tokens by layer and method."""
    lines = ["| layer | important | " + " | ".join(f"{m}: evaluated, read, redundant" for m in METHODS) + " |"]
    lines.append("|" + "---|" * (2 + len(METHODS)))
    for layer, part in frame.groupby("layer"):
        cells = [
            f"{row.evaluated:,.0f}, " + ("-, -" if np.isnan(row.read) else f"{row.read:,.0f}, {row.redundant:.0%}")
            for row in part.set_index("method").loc[list(METHODS)].itertuples()
        ]
        lines.append(f"| {layer} | {part.important.iloc[0]:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--tasks", nargs="+", default=["lines", "needle"])
    parser.add_argument("--misses", action="store_true", help="measure the misses of fixed chunk sizes instead")
    words = parser.parse_args()
    if words.misses:
        print(misses(words.tasks[0], words.tokens, words.n).to_string(), machine(), sep="\n")
        return
    print(table(measure(words.tasks, words.tokens, words.n, words.alpha)))
    print(f"Tokens; {words.n} questions each of {', '.join(words.tasks)} at {words.tokens}; {machine()}")


if __name__ == "__main__":
    main()
