"""Seeded synthetic long-context tasks, as LongBench records.

Every document is adversarial: the queried key is an adjective-noun pair. At least three other facts share its adjective
and at least three share its noun, so half of the key never suffices. `partial_key_floor` is the expected score of
guessing from half of the key. Test keys are English words that never occur in training; training keys are composed of
random syllables.
"""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hillinfer.longbench.words import PLACES, SUBJECTS, VERBS, Words, adversarial_keys, number, sentence

PROMPTS = {
    "lines": "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and "
    "contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n{context}\nNow the record is over. {input} ",
    "needle": "Read the text and remember the numbers in it.\n\n{context}\nNow the text is over. {input} ",
    "two_hop": "Read the text and remember the guards and the numbers in it.\n\n{context}\n"
    "Now the text is over. {input} ",
    "passage": "Read the paragraphs and remember the names in them.\n\n{context}\nNow the text is over. {input} ",
    "chain": "Each line has a number and leads to another line.\n\n{context}\nNow the record is over. {input} ",
    "majority": "Each line is one vote of a group for a word.\n\n{context}\nNow the record is over. {input} ",
    "tally": "Each line is the number of votes of a group for a word.\n\n{context}\nNow the record is over. {input} ",
}
QUESTION = {
    "lines": "Tell me what is the <REGISTER_CONTENT> in line {}? I need the number.",
    "needle": "What is the number of {}? Its number is",
    "two_hop": "What is the number of the guard of {}? Its guard is",
    "passage": "Which paragraph names the {}? It is paragraph",
    "chain": "Start at line {} and follow it to the end. It has number",
    "majority": "Which word has the most votes of {}? The word is",
    "tally": "Which word has the most votes of {}? The word is",
}
DEPTH = {"lines": "line {}:", "needle": "number of {} is", "passage": "The {} "}  # text that precedes the queried fact
MAX_NEW_TOKENS = {"lines": 8, "needle": 8, "two_hop": 32, "passage": 4, "chain": 128, "majority": 4, "tally": 4}
# Of the embedded tokenizer: tokens per line, vote or filler sentence, and tokens of the surrounding prompt and facts.
TOKENS_PER_UNIT = {
    "lines": 11.95,
    "needle": 9.7,
    "two_hop": 9.7,
    "passage": 12.0,
    "chain": 18.8,
    "majority": 5.7,
    "tally": 9.0,
}
TOKENS_OF_FRAME = {"lines": 125, "needle": 240, "two_hop": 520, "passage": 50, "chain": 60, "majority": 50, "tally": 55}
CHAIN = 7  # lines per chain


@dataclass
class Document:
    """A context and all questions that it answers."""

    context: str
    pairs: list[tuple[str, str]]  # (input, answer)


def scatter(rng: random.Random, facts: list[str], size: int) -> str:
    """The facts, shuffled among `size` filler sentences, in paragraphs of eight sentences."""
    text = [sentence(rng) for _ in range(size)] + facts
    rng.shuffle(text)
    return "".join(" ".join(text[i : i + 8]) + "\n" for i in range(0, len(text), 8))


def document(task: str, context: str, answers: dict[str, str]) -> Document:
    return Document(context, [(QUESTION[task].format(key), answer) for key, answer in answers.items()])


def lines(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """LongEval's line retrieval with `size` lines."""
    values = {key: number(rng, split) for key in adversarial_keys(rng, split, size, group)}
    return document("lines", "".join(f"line {k}: REGISTER_CONTENT is <{v}>\n" for k, v in values.items()), values)


def needle(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """Sixteen facts (four adjectives by four nouns) spread over `size` filler sentences."""
    values = {key: number(rng, split) for key in adversarial_keys(rng, split, group * group, group)}
    return document("needle", scatter(rng, [f"The number of {k} is {v}." for k, v in values.items()], size), values)


def two_hop(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """Sixteen facts name a guard, sixteen state the guards' numbers; the answer is the guard, then its number."""
    keys = adversarial_keys(rng, split, group * group, group)
    guards = adversarial_keys(rng, split, group * group, group)
    values = [number(rng, split) for _ in guards]
    facts = [f"The guard of {k} is {g}." for k, g in zip(keys, guards, strict=True)]
    facts += [f"The number of {g} is {v}." for g, v in zip(guards, values, strict=True)]
    answers = {k: f"{g}, whose number is {v}" for k, g, v in zip(keys, guards, values, strict=True)}
    return document("two_hop", scatter(rng, facts, size), answers)


def passage(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """Numbered paragraphs, each with one key sentence; the question asks for the number of a key's paragraph."""
    n = max(2, min(99, size // 5))
    keys = adversarial_keys(rng, split, n, group)
    ids = sorted(rng.sample(range(1, 100), n)) if split == "train" else list(range(1, n + 1))
    if split == "train" and rng.random() < 0.5:
        rng.shuffle(ids)
    text = []
    for i, key in zip(ids, keys, strict=True):
        named = f"The {key} {rng.choice(VERBS)} the {rng.choice(SUBJECTS)} {rng.choice(PLACES)}."
        sentences = [named, *(sentence(rng) for _ in range(rng.randint(3, 5)))]
        rng.shuffle(sentences)
        text.append(f"Paragraph {i}: {' '.join(sentences)}\n")
    return document("passage", "".join(text), {key: str(i) for i, key in zip(ids, keys, strict=True)})


def chain(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """Shuffled lines that form chains of seven; the answer is a whole chain of over 64 tokens.

    Training questions start at any line, test questions at the first line of a chain.
    """
    keys = adversarial_keys(rng, split, max(1, size // CHAIN) * CHAIN, group)
    answers, rows = {}, []
    for i in reversed(range(len(keys))):
        value, last = number(rng, split), i % CHAIN == CHAIN - 1
        rows.append(f"line {keys[i]}: number {value} leads to {'the end' if last else keys[i + 1]}\n")
        rest = "the end" if last else f"{keys[i + 1]}: number {answers[keys[i + 1]]}"
        answers[keys[i]] = f"{value} leads to {rest}"
    rng.shuffle(rows)
    asked = {key: answers[key] for key in (keys if split == "train" else keys[::CHAIN])}
    return document("chain", "".join(rows), asked)


def majority(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """`size` votes of several groups for eight words; the question asks for one group's most frequent word.

    In each group, about 40 % of the votes go to the winner and 25 % to the runner-up.
    """
    groups = Words(rng, split).draw(max(2, min(12, size // 24)), "adjective")
    votes, answers = [], {}
    for name in groups:
        n = max(4, size // len(groups))
        words = rng.sample(SUBJECTS, 8)
        first, second = max(2, round(0.4 * n)), max(1, round(0.25 * n))
        answers[name] = words[0]
        others = [words[2 + i % 6] for i in range(n - first - second)]
        votes += [f"{name} votes for {word}.\n" for word in words[:1] * first + words[1:2] * second + others]
    rng.shuffle(votes)
    return document("majority", "".join(votes), answers)


def tally(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """`size` lines, each with several votes; the question asks for the word with the most votes of one group.

    In each group, one word has many lines with small counts and another has few lines with large counts. Either may
    win, by at least a fifth, so neither counting lines nor reading only the large counts suffices.
    """
    groups = Words(rng, split).draw(max(2, min(12, size // 60)), "adjective")
    rows, answers = [], {}
    for name in groups:
        n = max(8, size // len(groups))
        many, few = round(0.35 * n), max(2, round(0.14 * n))
        words = rng.sample(SUBJECTS, 8)
        winner, votes = rng.randrange(2), []
        while not votes or not wins(words[winner], votes):
            votes = [(rng.randint(1, 4), words[0]) for _ in range(many)]
            votes += [(rng.randint(5, 9), words[1]) for _ in range(few)]
            votes += [(rng.randint(1, 9), words[2 + i % 6]) for i in range(n - many - few)]
        answers[name] = words[winner]
        rows += [f"{count} of {name} votes for {word}.\n" for count, word in votes]
    rng.shuffle(rows)
    return document("tally", "".join(rows), answers)


def wins(word: str, votes: list[tuple[int, str]]) -> bool:
    """True if `word` has at least a fifth more votes than any other."""
    total: Counter[str] = Counter()
    for count, voted in votes:
        total[voted] += count
    return all(total[word] >= 1.2 * count for other, count in total.items() if other != word)


TASKS = {f.__name__: f for f in (lines, needle, two_hop, passage, chain, majority, tally)}


def size_for(task: str, tokens: int) -> int:
    """Number of lines or filler sentences for a prompt of about `tokens` tokens."""
    return max(4, int((tokens - TOKENS_OF_FRAME[task]) / TOKENS_PER_UNIT[task]))


def make_records(task: str, tokens: int, n: int, seed: int, split: str = "test") -> list[dict]:
    """`n` LongBench records of one task with prompts of about `tokens` tokens.

    Each record has its own document up to 2,048 tokens; above, up to four consecutive questions share one.
    """
    records, shared = [], 1 if tokens <= 2048 else 4
    for i in range(n):
        if i % shared == 0:
            rng = random.Random(f"{task}-{tokens}-{seed}-{split}-{i // shared}")
            document = TASKS[task](rng, split, size_for(task, tokens))
            pairs = rng.sample(document.pairs, min(shared, len(document.pairs)))
        question, answer = pairs[i % shared % len(pairs)]
        if task == "needle":  # at a controlled depth: 5 %, 35 %, 65 %, 95 %, 25 % ...
            question, answer = at_depth(document, (i * 3 % 10 + 0.5) / 10)
        records.append({
            "input": question, "context": document.context, "answers": [answer],
            "length": len(document.context.split()), "dataset": task, "language": "en", "all_classes": None,
            "_id": f"{task}_{tokens}_{seed}_{i}",
        })  # fmt: skip
    return records


def at_depth(document: Document, share: float) -> tuple[str, str]:
    """The question whose answer is nearest to the given relative depth of the context."""
    text = document.context
    return min(document.pairs, key=lambda pair: abs(text.index(f" is {pair[1]}.") / len(text) - share))


def asked_key(record: dict) -> str:
    before, after = QUESTION[record["dataset"]].split("{}")
    return record["input"].removeprefix(before).removesuffix(after)


def depth_of(record: dict) -> float | None:
    """Relative depth of the queried fact in the context, from 0 to 1; None if the answer depends on several places."""
    if record["dataset"] not in DEPTH:
        return None
    return record["context"].index(DEPTH[record["dataset"]].format(asked_key(record))) / len(record["context"])


def in_window(task: str, tokens: int, share: float, seed: int) -> Iterator[dict]:
    """Endless test records whose queried fact lies within the last `share` of the context."""
    for further in itertools.count(seed):
        for record in make_records(task, tokens, 100, further):
            depth = depth_of(record)
            if depth is None or depth > 1 - 0.9 * share:
                yield record


def prompt_of(record: dict) -> str:
    return PROMPTS[record["dataset"]].format(context=record["context"], input=record["input"])


def facts_of(record: dict) -> list[tuple[str, str]]:
    """All (key, answer) pairs that the context states for the record's kind of question."""
    task, text = record["dataset"], record["context"]
    if task == "lines":
        return re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", text, re.M)
    if task == "majority":
        return re.findall(r"^(\S+) votes for (\w+)\.$", text, re.M)
    if task == "tally":
        rows = re.findall(r"^(\d+) of (\S+) votes for (\w+)\.$", text, re.M)
        return [(name, word) for count, name, word in rows for _ in range(int(count))]
    if task == "passage":
        return [(key, i) for i, rest in re.findall(r"^Paragraph (\d+): (.*)$", text, re.M)
                for key in re.findall(r"\w+-[\w-]+", rest)]  # fmt: skip
    if task == "chain":
        rows = {k: (v, to) for k, v, to in re.findall(r"^line (\S+): number (\d+) leads to (.*)$", text, re.M)}
        facts = []
        for key in rows:
            value, to = rows[key]
            answer = f"{value} leads to {to}"
            while to in rows:
                value, to = rows[to]
                answer += f": number {value} leads to {to}"
            facts.append((key, answer))
        return facts
    numbers = re.findall(r"The number of (\S+) is (\d+)\.", text)
    if task == "needle":
        return numbers
    number_of = dict(numbers)
    return [(k, f"{g}, whose number is {number_of[g]}") for k, g in re.findall(r"The guard of (\S+) is (\S+)\.", text)]


def partial_key_floor(record: dict) -> float:
    """Expected score of guessing among the facts that share half of the queried key.

    The better half (adjective or noun) counts, and all later hops are assumed correct. `majority` and `tally` have keys
    of one word; there the guess is a random vote of the queried group.
    """
    asked, facts, scores = asked_key(record), facts_of(record), []
    for part in (0, 2):
        answers = [answer for key, answer in facts if key.partition("-")[part] == asked.partition("-")[part]]
        scores.append(answers.count(record["answers"][0]) / len(answers))
    return scores[0] if record["dataset"] in ("majority", "tally") else max(scores)


def load_records(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
