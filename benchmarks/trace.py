"""Selected and predicted tokens of decode steps, recorded on a model and tiled over longer contexts.

    python -m benchmarks.trace MODEL --rows FOLDER [--tasks ...] --out FILE    # for benchmarks.shape --trace FILE

By default the embedded model's, on texts of its own; MODEL's on a LongBench row of each task, cut to 8K tokens.

A context of 32,768 tokens consists of four documents of 8,192, each with its own question: if a step of one document
selects token p, the long context selects document * 8,192 + p. Locality, overlap between steps and differences between
layers are those recorded. The attention over a single text of that length is unknown. Deeper models repeat the recorded
layers except the first, for which there is no guess.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from hillinfer.assets import load_embedded
from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.evaluator.policies import TopK
from hillinfer.loading import load_model
from hillinfer.longbench.job import prompt_of as row_prompt
from hillinfer.longbench.runner import feed
from hillinfer.longbench.sources import load_all
from hillinfer.longbench.synthetic import make_records, prompt_of
from hillinfer.pipeline.lookahead import AHEAD

TOKENS, SEED, CHUNK = 8192, 5, 2048


def record(path: Path, documents: int = 4) -> "Trace":
    """Load the recorded trace, or record the embedded model's: prefills `documents` texts of 8K tokens."""
    if not path.exists():
        logging.disable_progress_bar()
        model, tokenizer = load_embedded()
        texts = [make_records("chain", TOKENS, 1, SEED + number)[0] for number in range(documents)]
        keep(path, model, [tokenizer(prompt_of(text)).input_ids for text in texts])
    return Trace(path)


def keep(path: Path, model, documents: list[list[int]], chunk=None, steps: int = 48, alpha: float = 0.1) -> None:
    """Record what `model` selects after each of these prompts."""
    picks = {}
    for number, ids in enumerate(documents):
        notes, _ = selections(model, ids, steps, alpha, chunk)
        for index, noted in enumerate(notes):
            for kind, kept in noted.kept.items():
                for step, positions in enumerate(kept):
                    picks[f"{kind}-{number}-{step}-{index}"] = positions.astype(np.int32)
        picks[f"n-{number}"] = np.array([len(ids), len(notes), len(notes[0].kept["true"])])
        print(f"{number + 1} of {len(documents)} documents", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **picks)


def selections(model, ids: list[int], steps: int, alpha: float, chunk: int | None = None) -> tuple[list, list[int]]:
    """What each layer selects, and is guessed to, in greedy decode steps after `ids`; and the tokens of these steps."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():  # lookahead needs a drive
        settings = Settings(alpha=alpha, drive=folder, lookahead=True)
        with TieredCache(model.config, TopK, settings) as cache:
            cache.attach(model)
            notes, tokens = [_Noted() for _ in cache.tiered], [ids[-1]]
            for layer, noted in zip(cache.tiered, notes, strict=True):
                layer.policy = noted
            feed(model, cache, ids[:-1], chunk)
            for _ in range(steps + 1):
                logits = model(_column(tokens[-1]), past_key_values=cache, logits_to_keep=1).logits
                tokens.append(int(logits[0, -1].argmax()))
    return notes, tokens[1:-1]


class _Noted(TopK):
    """Top-k that records its selections."""

    def __init__(self):
        self.kept = {"true": [], "guess": [], "sure": []}

    def select(self, step):
        picked = super().select(step)
        self.kept["guess" if step.guess else "true"].append(picked)
        if step.guess:
            self.kept["sure"].append(super().select(replace(step, budget=int(AHEAD[1] * step.budget))))
        return picked


def _column(token: int):
    return torch.tensor([[token]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path, required=True, help="folder of LongBench rows")
    parser.add_argument("--tasks", default="gov_report,narrativeqa,hotpotqa,repobench-p", help="of long rows")
    parser.add_argument("--out", type=Path, default=Path("out/trace-real.npz"))
    words = parser.parse_args()
    model, tokenizer = load_model(words.model)
    documents = []
    for task, rows, _ in load_all(words.tasks.split(","), [words.rows]):
        prompts = (row_prompt(task, row, model.config, tokenizer, TOKENS) for row in rows)
        documents.append(
            next(prompt.ids for prompt in prompts if len(prompt.ids) > TOKENS - 64)
        )  # long enough to be cut
    keep(words.out, model, documents, CHUNK)


if __name__ == "__main__":
    main()


class Trace:
    """Recorded selections."""

    def __init__(self, path: Path):
        with np.load(path) as data:
            self.picks = {name: data[name] for name in data.files}
        shapes = [self.picks[name] for name in self.picks if name.startswith("n-")]
        self.documents = len(shapes)
        self.tokens, self.layers, self.steps = np.array(shapes).min(0).tolist()

    def layer(self, index: int) -> int:
        """The recorded layer used for layer `index` of a deeper model."""
        return index if index < self.layers else 1 + (index - 1) % (self.layers - 1)

    def positions(self, n: int, layer: int, step: int, kind: str = "true") -> np.ndarray:
        """Sorted positions that a step selects of n cached tokens; kind `guess`: that were guessed for it, `sure`: the
        surest of these (both not for the first layer, which nothing comes before).
        """
        parts, start, document = [], 0, 0
        while start < n:
            picks = self.picks[f"{kind}-{document % self.documents}-{step % self.steps}-{self.layer(layer)}"]
            parts.append(start + picks[picks < min(self.tokens, n - start)])
            start, document = start + self.tokens, document + 1
        return np.concatenate(parts)
