"""Needles in real text: the code of a thing, asked by name, among three distractors of the same form.

The four things pair two adjectives with two nouns, so half of the name does not suffice. The text is a novel
(`data/text`): any tokenizer and any model with real attention can read it.
"""

import random
import re
from bisect import bisect
from dataclasses import replace
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError
from hillinfer.longbench.prompts import Prompt, build
from hillinfer.longbench.tasks import BUNDLED, Task
from hillinfer.longbench.words import ADJECTIVES, NOUNS, number

TASK = Task(
    "needles", BUNDLED, "Read the text and remember the codes in it.\n\n{context}\n\n{input}\n", 8, "exact", "needles"
)
FLOOR = 0.5  # expected accuracy of guessing among the codes that share half of the name
FRAME, LEAST = 140, 800  # tokens of question and facts; the shortest prompt with sentences between the facts
SENTENCE = re.compile(r'(?<=[a-z]{3}[.!?] )(?=[A-Z"])|(?<=\n\n)')  # each keeps the space after it; no end at "Mr. "
FACT = "The code of the {} is {}."


def make_needles(tokenizer: PreTrainedTokenizerBase, tokens: int, n: int, seed: int = 0) -> list[dict]:
    """`n` records with prompts of at most `tokens` tokens: LongBench's fields, and the `key` that is asked for.

    Each starts at a random sentence of the novel. The fact asked for lies at a depth of 5 %, 35 %, 65 %, 95 %, 25 %
    and so on.

    Raises UsageError if the novel is too short, or the prompt.
    """
    sentences = SENTENCE.split((data_folder("text") / "persuasion.txt").read_text(encoding="utf-8"))
    ends = [0, *accumulate(map(len, tokenizer(sentences, add_special_tokens=False).input_ids))]
    if not LEAST <= tokens <= ends[-1]:
        raise UsageError(f"needles need prompts of {LEAST} to {ends[-1]:,} tokens, not {tokens:,}")
    records = []
    for i in range(n):
        name = f"{TASK.name}_{tokens}_{seed}_{i}"
        rng = random.Random(name)
        first = rng.choice([j for j, end in enumerate(ends) if end + tokens - FRAME <= ends[-1]])
        last = bisect(ends, ends[first] + tokens - FRAME) - 1
        records.append(_record(name, rng, sentences[first:last], (i * 3 % 10 + 0.5) / 10))
    return records


def _record(name: str, rng: random.Random, text: list[str], depth: float) -> dict:
    (a, b), (x, y) = rng.sample(ADJECTIVES, 2), rng.sample(NOUNS, 2)
    key, *others = f"{a} {x}", f"{a} {y}", f"{b} {x}", f"{b} {y}"
    codes = {name: number(rng) for name in (key, *others)}
    asked = int(depth * len(text))
    places = [asked, *rng.sample([i for i in range(len(text)) if i != asked], 3)]
    for place, fact in zip(places, codes.items(), strict=True):
        text[place] = f"{FACT.format(*fact)} {text[place]}"
    context, question = "".join(text).strip(), f"What is the code of the {key}? Answer with its five digits."
    return {
        "input": question, "context": context, "answers": [codes[key]], "length": len(context.split()), "key": key,
        "dataset": TASK.name, "language": "en", "all_classes": None, "_id": name,
    }  # fmt: skip


def needle_prompt(tokenizer: PreTrainedTokenizerBase, record: dict) -> tuple[Prompt, list[int]]:
    """The prompt, up to "The code of the ... is" at the head of the answer; and the tokens that complete it."""
    prompt = build(TASK, record, tokenizer, max_length=1 << 40, chat=bool(tokenizer.chat_template))
    before, after = FACT.split(" {}.")[0].format(record["key"]), f" {record['answers'][0]}"
    head, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, before + after))
    differing = (i for i, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1])
    same = next(differing, len(head))  # some tokenizers write "is" and the space after it as one token
    return replace(prompt, ids=prompt.ids + whole[:same]), whole[same:]
