"""Vocabulary of the synthetic tasks: words, keys, numbers and filler sentences for the training and test splits."""

import math
import random

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

ONSETS = "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sm sn sp st str sw"
ONSETS = [*ONSETS.split(), "th", "tr", "wh"]
VOWELS = "a e i o u y a e i o u ai ea ee oa oo ou ie".split()
CODAS = "b c d f g k l m n p r s t x ck ct ll ld lt mp nd ng nk nt rd rk rl rm rn rt sh sk ss st th".split()
ADJECTIVE_ENDINGS = "able al ant ary ed en ent ern esque ful ian ible ic ing ish ive less ous some ular y".split()
NOUN_ENDINGS = "age ance ant ard dom ee el er ery et ette ence ing ion ism ist ity let ment ness or ship".split()
NOUN_ENDINGS += ["sion", "tion", "ture"]

SUBJECTS = "river village garden market captain teacher winter window letter valley forest engine bridge".split()
SUBJECTS += ["painter"]
VERBS = "follows crosses remembers carries watches leaves finds reaches answers opens".split()
PLACES = "near the old mill|after the long rain|before the first light|behind the stone wall|along the quiet road"
PLACES = [*PLACES.split("|"), "with great care", "for many years", "without a word"]


class Words:
    """Adjectives and nouns of one split: composed of syllables for "train", the lists above for "test"."""

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
        """A word that differs from `word` in a few letters."""
        cut = self.rng.randrange(1, max(2, len(word) - 1))
        other = self._syllable()
        return word[:cut] + other if self.rng.random() < 0.5 else other + word[cut:]


def adversarial_keys(rng: random.Random, split: str, n: int, group: int = 4) -> list[str]:
    """`n` distinct keys in random order; each adjective and each noun occurs about `group` times.

    Round r pairs adjective i with noun i + shift_r. Distinct shifts yield distinct pairs.
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
    """A random number of five digits; one in eight training values is shorter."""
    short = split == "train" and rng.random() < 0.12
    return str(rng.randint(1, 9999) if short else rng.randint(10000, 99999))


def sentence(rng: random.Random) -> str:
    return f"The {rng.choice(SUBJECTS)} {rng.choice(VERBS)} the {rng.choice(SUBJECTS)} {rng.choice(PLACES)}."
