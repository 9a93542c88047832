"""Does a replay on this machine's profile predict its measured step times?

    python -m benchmarks.self_replay --drive FOLDER --rounds 3

The cost of each kind of work is calibrated on small random models. The prediction covers decode steps of the embedded
model, which has another shape and other contexts, for every system. Calibration and measurement alternate within each
round, so machine noise affects both. Figures are medians over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from hillinfer.assets import load_embedded, machine
from hillinfer.longbench.comparison import demo_records
from hillinfer.systems.hillinfer.profile import THIS, Profile
from hillinfer.timeline import Timeline
from hillinfer.whatif.calibrate import CONTEXTS, costs, random_models, record, variants
from hillinfer.whatif.measure import measure_parts
from hillinfer.whatif.recording import decode_steps
from hillinfer.whatif.replay import modelled_seconds, replay

MEASURED = (1536, 3072, 7168)  # tokens; none is a calibration point


def measure(folder: Path, rounds: int = 3, names: list[str] | None = None, contexts=MEASURED) -> pd.DataFrame:
    """One row per system and context: median measured and modelled ms per step, and the relative error."""
    calibrated, runs = run(folder, rounds, names, contexts)
    return compare(Profile(THIS, machine(), measure_parts(folder), costs(calibrated, "measured: in this run")), runs)


def run(folder: Path, rounds: int, names: list[str] | None, contexts) -> tuple[list[Timeline], dict]:
    """Calibration timelines, and the timelines to predict: (system, context) -> one per round."""
    model, tokenizer = load_embedded()
    document = tokenizer(demo_records({"lines_8k": 1})[0]["context"]).input_ids
    rng, calibrated, runs = np.random.default_rng(0), [], defaultdict(list)
    small = random_models()
    for _ in range(rounds):
        for name, options in variants(folder, names=names).items():
            for other in small:
                for context in CONTEXTS:
                    calibrated.append(record(other, name, options, rng.integers(3, 1000, context).tolist()))
            for context in contexts:
                runs[name, context].append(record(model, name, options, document[:context]))
            print(".", end="", file=sys.stderr, flush=True)
    return calibrated, runs


def compare(profile: Profile, runs: dict[tuple[str, int], list[Timeline]]) -> pd.DataFrame:
    rows = []
    for (name, context), timelines in runs.items():
        measured = [
            statistics.median(step.seconds for step in decode_steps(line) if step.seconds) for line in timelines
        ]
        modelled = [statistics.median(modelled_seconds(replay(line, profile, most=99))) for line in timelines]
        row = {"system": name, "context": context, "measured ms": statistics.median(measured) * 1e3}
        row |= {
            "lowest": min(measured) * 1e3,
            "highest": max(measured) * 1e3,
            "modelled ms": statistics.median(modelled) * 1e3,
        }
        rows.append(row | {"error": row["modelled ms"] / row["measured ms"] - 1})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drive", type=Path, help="folder on the drive; by default a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", help="by default all")
    parser.add_argument("--contexts", type=int, nargs="+", default=MEASURED)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.drive) as folder:
        frame = measure(Path(folder), args.rounds, args.systems, args.contexts)
    print(frame.to_string(index=False, float_format="%.2f"))
    print(f"median of |error|: {frame.error.abs().median():.1%}; measured on {machine()}")


if __name__ == "__main__":
    main()
