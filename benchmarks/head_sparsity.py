"""How many tokens each head of real models needs, on the shortest LongBench rows: `notebooks/kept/head-sparsity.csv`.

    python -m benchmarks.head_sparsity MODEL ... --rows FOLDER --tasks 2wikimqa,multifieldqa_en

Each row is asked with all KV in memory and attended to in full; a figure is the mean over the steps of the question and
of its answer, and over the rows. No times are measured.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.claims import ROOT
from hillinfer.loading import load_model
from hillinfer.workbench.cases import Case, rows_of
from hillinfer.workbench.live import LiveRun
from hillinfer.workbench.observe import AttentionRecord

KEPT = ROOT / "notebooks" / "kept" / "head-sparsity.csv"


def measure(name: str, folder: str, tasks: list[str]) -> pd.DataFrame:
    """A row for each layer and head: the share of the tokens that holds 90 % of its attention."""
    (model, tokenizer), needed, tokens = load_model(name), [], []
    for task in tasks:
        record = AttentionRecord(exact=True)
        asked = Case.row(tokenizer, model.config, task, min(rows_of(task, folder)[0], key=lambda r: len(r["context"])))
        LiveRun(model, tokenizer, asked, "full", {}, record).start().result()
        needed.append(record.needed())
        tokens.append(len(asked.context))
        print(name, asked.title, f"{needed[-1].mean():.1%}", flush=True)
    shares = np.mean(needed, 0)
    layer, head = np.indices(shares.shape)
    setting = dict(model=Path(name).name, tasks=" ".join(tasks), tokens=" ".join(map(str, tokens)))
    return pd.DataFrame({"layer": layer.ravel(), "head": head.ravel(), "needed": shares.ravel().round(5)}).assign(
        **setting
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rows", required=True, help="LongBench's folder or data.zip")
    parser.add_argument("--tasks", default="2wikimqa,multifieldqa_en")
    parser.add_argument("--out", type=Path, default=KEPT)
    wanted = parser.parse_args()
    parts = [measure(name, wanted.rows, wanted.tasks.split(",")) for name in wanted.models]
    pd.concat(parts).to_csv(wanted.out, index=False)


if __name__ == "__main__":
    main()
