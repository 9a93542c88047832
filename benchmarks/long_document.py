"""A document of 64K tokens and ten questions: python -m benchmarks.long_document MODEL [--drive FOLDER]

The document is a novel in which ten codes are hidden, each asked for by name. hillinfer prefills it once, with its KV
on the drive, and saves the session; another process opens that and answers. DynamicCache prefills in chunks of the same
length and answers in one process. A model with a shorter window needs its YaRN settings in config.json.

For each part: minutes, bytes read from and written to disks, and the most anonymous memory beyond the loaded weights.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pandas as pd
import torch
from transformers import DynamicCache

from benchmarks.prefill import resident, sampled
from hillinfer.assets import data_folder, machine
from hillinfer.loading import load_model
from hillinfer.longbench.needles import FACT, SENTENCE
from hillinfer.longbench.runner import feed
from hillinfer.longbench.words import ADJECTIVES, NOUNS, number
from hillinfer.pipeline.memory import read_fields
from hillinfer.session import open_session, save_session
from hillinfer.systems.registry import make_cache

QUESTIONS, CHUNK, NEW_TOKENS = 10, 2048, 8
WAYS = ("hillinfer, reading", "hillinfer, asking", "DynamicCache")
HEAD = "Read the text and remember the codes in it.\n\n"


def document(tokenizer, tokens: int) -> tuple[list[int], list[tuple[str, str]]]:
    """Token ids of at most so many tokens, and the names and codes in it, at equal distances."""
    rng, text = random.Random(0), (data_folder("text") / "persuasion.txt").read_text(encoding="utf-8")
    names = zip(rng.sample(ADJECTIVES, QUESTIONS), rng.sample(NOUNS, QUESTIONS), strict=True)
    facts = [(" ".join(pair), number(rng)) for pair in names]
    sentences, room = [], tokens - 40 * QUESTIONS
    for sentence in SENTENCE.split(text):
        room -= len(tokenizer(sentence, add_special_tokens=False).input_ids)
        if room < 0:
            break
        sentences.append(sentence)
    for i, fact in enumerate(facts):
        at = int((i + 0.5) / QUESTIONS * len(sentences))
        sentences[at] = f"{FACT.format(*fact)} {sentences[at]}"
    return tokenizer(HEAD + "".join(sentences)).input_ids, facts


class Meter:
    """Rows of measured parts, one JSON line each."""

    def __init__(self, way: str):
        self.way, self.base = way, resident()

    @contextmanager
    def part(self, name: str) -> Iterator[dict]:
        """Measure a part; the row keeps what the caller adds to it."""
        row, start, disks = {"way": self.way, "part": name}, time.perf_counter(), read_fields(Path("/proc/self/io"))
        with sampled() as most:
            yield row
        row |= {"minutes": (time.perf_counter() - start) / 60, "peak MiB": (most[0] - self.base) / 2**20}
        moved = read_fields(Path("/proc/self/io"))
        row |= {f"{verb} MB": (moved[f"{verb}_bytes"] - disks[f"{verb}_bytes"]) / 1e6 for verb in ("read", "write")}
        print(json.dumps(row), flush=True)


def ask(model, tokenizer, cache, ids: list[int], facts: list[tuple[str, str]]) -> int:
    """Right answers; after each question the cache is cropped to the document."""
    right = 0
    for name, code in facts:
        head = "\n\n" + FACT.split(" {}.")[0].format(name)
        asked = torch.tensor([ids + tokenizer(head, add_special_tokens=False).input_ids])
        out = model.generate(asked, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
        right += code in tokenizer.decode(out[0, asked.shape[1] :])
        cache.crop(len(ids) - cache.get_seq_length())
    return right


def measure(words) -> None:
    """One way, in this process."""
    model, tokenizer = load_model(words.model)
    ids, facts = document(tokenizer, words.tokens)
    session, options = words.drive / "document.kv", dict(alpha=words.alpha, drive=words.drive)
    feed(model, DynamicCache(config=model.config), ids[:64])  # the libraries' own buffers
    meter = Meter(words.way)
    if words.way == "hillinfer, reading":
        with make_cache(model, "hillinfer", **options) as cache:
            with meter.part(f"prefill of {len(ids):,} tokens"):
                feed(model, cache, ids, CHUNK)
            with meter.part("saved"):
                save_session(cache, session, model, ids, tokenizer)
    elif words.way == "hillinfer, asking":
        with meter.part("opened"):
            cache, ids = open_session(session, model, "hillinfer", tokenizer, **options)
        with closing(cache), meter.part(f"{len(facts)} questions") as row:
            row["right"] = ask(model, tokenizer, cache, ids, facts)
    else:
        cache = DynamicCache(config=model.config)
        with meter.part(f"prefill of {len(ids):,} tokens"):
            feed(model, cache, ids, CHUNK)
        with meter.part(f"{len(facts)} questions") as row:
            row["right"] = ask(model, tokenizer, cache, ids, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--tokens", type=int, default=64_000)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to use")
    parser.add_argument("--way", choices=WAYS, help="one way alone, in this process")
    words = parser.parse_args()
    if words.way:
        measure(words)
        return
    rows = []
    words.drive.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=words.drive) as folder:
        for way in WAYS:
            own = ["--tokens", str(words.tokens), "--alpha", str(words.alpha), "--drive", folder, "--way", way]
            command = [sys.executable, "-m", "benchmarks.long_document", words.model, *own]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
                for line in running.stdout:
                    rows.append(json.loads(line))
                    print(line, end="", flush=True)
            if running.returncode:
                raise SystemExit(f"{way} failed")
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.2f"))
    print(f"{words.model}, alpha {words.alpha}; {machine()}")


if __name__ == "__main__":
    main()
