"""Hot-pool placement: bytes read from the drive at equal memory, by placement and task.

python -m benchmarks.placement --n 4
"""

import argparse
import tempfile
from unittest import mock

import numpy as np
import pandas as pd
from transformers.utils import logging

from hillinfer.assets import load_embedded
from hillinfer.longbench.comparison import compare, demo_records
from hillinfer.tiers.hits import PLACEMENTS, SharedHits

TASKS = ("lines_2k", "needle_2k", "chain_2k")


class LatestOnly(SharedHits):
    """The control `importance`: a layer keeps the tokens that are important now and forgets earlier ones."""

    shared = False
    dtype = np.uint8

    def touch(self, row: int, positions: np.ndarray) -> None:
        self.rank[row] = 0
        self.rank[row, positions] = 1

    def age(self) -> None: ...


CONTROLS = {"importance": {"lru": LatestOnly}}  # rankings that only this benchmark knows, in the place of another


def measure(tasks: list[str], n: int, alpha: float) -> pd.DataFrame:
    """One row per task and placement; the pool always holds 2*alpha of the tokens."""
    model, tokenizer = load_embedded()
    rows = []
    with tempfile.TemporaryDirectory() as drive:
        for task in tasks:
            records = demo_records({task: n})
            for placement in (*PLACEMENTS, *CONTROLS):
                instead = CONTROLS.get(placement, {})
                options = {"alpha": alpha, "drive": drive, "placement": next(iter(instead), placement)}
                with mock.patch.dict(PLACEMENTS, instead):
                    result = compare(model, tokenizer, records, ["hillinfer"], options | {"lookahead": False})[0]
                last = result.cache.counters.frame()
                rows.append(
                    {
                        "task": task,
                        "placement": placement,
                        "right": sum(result.right),
                        "of": n,
                        "served by the drive": result.rate("drive"),
                        "KiB from the drive per token": result.mean("drive_bytes_per_token") / 1024,
                        "swaps per layer and step": last.swapped.mean(),
                    }
                )
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--n", type=int, default=4, help="questions per task")
    parser.add_argument("--alpha", type=float, default=0.1)
    args = parser.parse_args()
    logging.disable_progress_bar()
    print(measure(args.tasks, args.n, args.alpha).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
