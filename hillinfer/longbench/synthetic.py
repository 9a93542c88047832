"""Seeded synthetic long-context tasks, as LongBench records.

Every document is adversarial: the asked key is an adjective-noun pair, and at least three other facts share its
adjective and at least three share its noun, so half of the key never suffices. `partial_key_floor` says what a
solver without a model would get from half of the key. Test keys are English words that no training document holds;
training keys are words put together from random syllables.
"""

import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

ADJECTIVES = """
amber azure brisk candid cobalt coastal copper cosmic crimson daring dusky earnest ebony fabled feral floral
folded foggy frosty gallant genial gilded glacial granite hasty hidden humid inky jovial kindred leafy limber
lunar marbled mellow meadowy mirthful mossy muted nimble nomadic northern oaken opal orchid pastel pearly pewter
plush polar rosy rugged russet sandy scarlet secluded serene silken silver snowy solar sparse stellar sturdy
sunlit supple tawny tidal tufted twilit upland velvet vernal vivid waxen western wicker willowy windy wintry
woven zesty
""".split()  # test only

NOUNS = """
anchor anvil apron arcade atlas balcony banner basin beacon birch blanket bobbin bramble bridge bucket buoy
button cabin candle canoe canyon cedar cellar chimney citadel comet compass cottage cradle crystal dagger
dragonfly eagle ember falcon fennel ferry flagon forge fountain fox gable galleon garnet ginger glacier goblet
granary grotto gull harbor hatchet hinge island jigsaw juniper kettle kiln lagoon ledger lighthouse lilac loom
magpie mantle marsh mitten mosaic nectar nutmeg obelisk otter pebble pigeon plateau quarry ribbon saddle sapling
satchel
""".split()  # test only

ONSETS = """
b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sm sn sp st str sw th
tr wh
""".split()
VOWELS = ["a", "e", "i", "o", "u", "y", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oa", "oo", "ou", "ie"]
CODAS = """
b c d f g k l m n p r s t x ck ct ll ld lt mp nd ng nk nt rd rk rl rm rn rt sh sk ss st th
""".split()
ADJECTIVE_ENDINGS = """
able al ant ary ed en ent ern esque ful ian ible ic ing ish ive less ous some ular y
""".split()
NOUN_ENDINGS = """
age ance ant ard dom ee el er ery et ette ence ing ion ism ist ity let ment ness or ship sion tion ture
""".split()

SUBJECTS = """
river village garden market captain teacher winter window letter valley forest engine bridge painter
""".split()
VERBS = ["follows", "crosses", "remembers", "carries", "watches", "leaves", "finds", "reaches", "answers", "opens"]
PLACES = (
    "near the old mill|after the long rain|before the first light|behind the stone wall|along the quiet road|"
    "with great care|for many years|without a word"
)
PLACES = PLACES.split("|")

PROMPTS = {
    "lines": "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains "
    "a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n{context}\nNow the record is over. {input} ",
    "needle": "Read the text and remember the numbers in it.\n\n{context}\nNow the text is over. {input} ",
}
MAX_NEW_TOKENS = {"lines": 8, "needle": 8}
TOKENS_PER_UNIT = {"lines": 12.9, "needle": 13.0}  # of the shipped tokenizer, per line or filler sentence
TOKENS_OF_FRAME = {"lines": 130, "needle": 235}  # the prompt around them, and the facts of `needle`
FACT = {
    "lines": re.compile(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", re.M),
    "needle": re.compile(r"The number of (\S+) is (\d+)\."),
}
QUESTION = {
    "lines": "Tell me what is the <REGISTER_CONTENT> in line {}? I need the number.",
    "needle": "What is the number of {}? Its number is",
}


@dataclass
class Document:
    """A context and every question it answers."""

    context: str
    pairs: list[tuple[str, str]]  # (input, answer)


class Words:
    """Adjectives and nouns of one split: syllables for "train", the lists above for "test"."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split

    def draw(self, n: int, kind: str) -> list[str]:
        held_out = ADJECTIVES if kind == "adjective" else NOUNS
        if self.split == "test":
            return self.rng.sample(held_out, n)
        endings = ADJECTIVE_ENDINGS if kind == "adjective" else NOUN_ENDINGS
        found: dict[str, None] = {}
        while len(found) < n:
            word = self._near(self.rng.choice(list(found))) if found and self.rng.random() < 0.1 else self._new(endings)
            if 2 < len(word) < 14 and word not in ADJECTIVES and word not in NOUNS:
                found[word] = None
        return list(found)

    def _syllable(self) -> str:
        r = self.rng
        onset = r.choice(ONSETS) if r.random() < 0.9 else ""
        return onset + r.choice(VOWELS) + (r.choice(CODAS) if r.random() < 0.55 else "")

    def _new(self, endings: list[str]) -> str:
        r = self.rng
        word = "".join(self._syllable() for _ in range(r.choice((1, 1, 2, 2, 2, 3))))
        if r.random() < 0.35:
            word += r.choice(endings)
        if r.random() < 0.04:
            word += "-" + self._syllable()
        return word

    def _near(self, word: str) -> str:
        """A word that differs from another in a few letters."""
        cut = self.rng.randrange(1, max(2, len(word) - 1))
        other = self._syllable()
        return word[:cut] + other if self.rng.random() < 0.5 else other + word[cut:]


def adversarial_keys(rng: random.Random, split: str, n: int, group: int = 4) -> list[str]:
    """`n` distinct keys in random order, in which each adjective and each noun occurs about `group` times.

    Round r pairs adjective i with noun i + shift_r; distinct shifts make distinct pairs.
    """
    if split == "test":
        group = max(group, -(-n // min(len(ADJECTIVES), len(NOUNS))))
    k = max(n // group, math.isqrt(n - 1) + 1)
    words = Words(rng, split)
    adjectives, nouns = words.draw(k, "adjective"), words.draw(k, "noun")
    shifts = rng.sample(range(k), min(k, -(-n // k)))
    keys = [f"{adjectives[i % k]}-{nouns[(i + shifts[i // k]) % k]}" for i in range(n)]
    rng.shuffle(keys)
    return keys


def number(rng: random.Random, split: str = "test") -> str:
    """Five digits; one in eight training values is shorter."""
    short = split == "train" and rng.random() < 0.12
    return str(rng.randint(1, 9999) if short else rng.randint(10000, 99999))


def sentence(rng: random.Random) -> str:
    return f"The {rng.choice(SUBJECTS)} {rng.choice(VERBS)} the {rng.choice(SUBJECTS)} {rng.choice(PLACES)}."


def lines(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """LongEval's line retrieval with `size` lines."""
    keys = adversarial_keys(rng, split, size, group)
    values = [number(rng, split) for _ in keys]
    context = "".join(f"line {k}: REGISTER_CONTENT is <{v}>\n" for k, v in zip(keys, values, strict=True))
    return Document(context, [(QUESTION["lines"].format(k), v) for k, v in zip(keys, values, strict=True)])


def needle(rng: random.Random, split: str, size: int, group: int = 4) -> Document:
    """Sixteen facts (four adjectives by four nouns) spread over `size` filler sentences."""
    keys = adversarial_keys(rng, split, group * group, group)
    values = [number(rng, split) for _ in keys]
    places = sorted(rng.sample(range(size + len(keys)), len(keys)))
    text, facts = [], iter(zip(keys, values, strict=True))
    for i in range(size + len(keys)):
        text.append("The number of {} is {}.".format(*next(facts)) if i in places else sentence(rng))
    paragraphs = [" ".join(text[i : i + 8]) + "\n" for i in range(0, len(text), 8)]
    return Document("".join(paragraphs), [(QUESTION["needle"].format(k), v) for k, v in zip(keys, values, strict=True)])


TASKS = {"lines": lines, "needle": needle}


def size_for(task: str, tokens: int) -> int:
    """How many lines or filler sentences fill a prompt of about `tokens` tokens."""
    return max(4, int((tokens - TOKENS_OF_FRAME[task]) / TOKENS_PER_UNIT[task]))


def make_records(task: str, tokens: int, n: int, seed: int, split: str = "test") -> list[dict]:
    """`n` LongBench records of one task, each from a document of its own, prompts of about `tokens` tokens."""
    records = []
    for i in range(n):
        rng = random.Random(f"{task}-{tokens}-{seed}-{split}-{i}")
        document = TASKS[task](rng, split, size_for(task, tokens))
        question, answer = rng.choice(document.pairs)
        records.append({
            "input": question, "context": document.context, "answers": [answer],
            "length": len(document.context.split()), "dataset": task, "language": "en", "all_classes": None,
            "_id": f"{task}_{tokens}_{seed}_{i}",
        })  # fmt: skip
    return records


def prompt_of(record: dict) -> str:
    return PROMPTS[record["dataset"]].format(context=record["context"], input=record["input"])


def partial_key_floor(record: dict) -> float:
    """Expected score of a solver that knows one part of the asked key and picks at random among the facts with it.

    The best single part (adjective or noun) counts.
    """
    facts = FACT[record["dataset"]].findall(record["context"])
    asked = next(key for key, _ in facts if re.search(rf"(?<=\s){re.escape(key)}(?=\?)", record["input"]))
    scores = []
    for part in (0, 1):
        values = [value for key, value in facts if key.partition("-")[2 * part] == asked.partition("-")[2 * part]]
        scores.append(values.count(record["answers"][0]) / len(values))
    return max(scores)


def load_records(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
