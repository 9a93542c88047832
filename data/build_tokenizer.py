"""Build the model's tokenizer from the syllables and the wording of hillinfer.longbench.synthetic.

Unigram model over letters, syllables, endings, whole words of the templates, pairs of digits, and bytes for everything
else. The text frames around a key are single tokens, so a key's last piece is adjacent to the position where its value
is read or queried. Words never merge with the preceding text, so a key has the same pieces everywhere.
"""

import re
import string
import sys
import zlib
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hillinfer.longbench import synthetic as syn
from hillinfer.longbench import words

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]
FRAMES = [
    "line ", ">\n", ": REGISTER_CONTENT is <", "Tell me what is the <REGISTER_CONTENT> in line ",
    "? I need the number. ", "REGISTER_CONTENT", "The number of ", " is ", "What is the number of ", "? Its number is ",
    "The guard of ", "What is the number of the guard of ", "? Its guard is ", ", whose number is ",
    "Paragraph ", "Which paragraph names the ", "? It is paragraph ",
    "Start at line ", " and follow it to the end. It has number ", ": number ", " leads to ",
    "Which word has the most votes of ", "? The word is ", " votes for ", ".\n",
    "Now the record is over. ", "Now the text is over. ",
]  # fmt: skip


def pieces() -> list[str]:
    letters = list(string.ascii_lowercase)
    simple = [o for o in words.ONSETS if len(o) < 3]
    single = [c for c in words.CODAS if len(c) == 1]
    vowels = "aeiou"
    out = list(string.printable[:95]) + ["\n", "\t"]
    out += [f"{i:02d}" for i in range(100)]
    out += [o + v for o in words.ONSETS for v in dict.fromkeys(words.VOWELS)]
    out += [v + c for v in vowels for c in words.CODAS]
    out += [o + v + c for o in letters if o not in "aeioux" for v in vowels for c in "cdglmnprst"]
    out += [o + v + c for o in simple if len(o) == 2 for v in vowels for c in "nrl"]
    out += [a + b for a in single for b in "ey"]
    out += ["The", " The"]
    out += words.ADJECTIVE_ENDINGS + words.NOUN_ENDINGS
    text = " ".join(p for t in syn.PROMPTS.values() for p in (t, *syn.QUESTION.values()))
    text += " ".join(["", *words.SUBJECTS, *words.VERBS, *words.PLACES])
    for word in re.findall(r" ?[A-Za-z]+", text):
        out.append(word)
        out += [word.strip(), " " + word.strip().lower()]
    return list(dict.fromkeys(out))


def build() -> PreTrainedTokenizerFast:
    # Distinct scores avoid ties, so a word always has the same segmentation: the one with the fewest pieces.
    vocabulary = [(t, 0.0) for t in SPECIAL] + [(f"<0x{i:02X}>", -30.0) for i in range(256)]
    vocabulary += [(p, -10 - zlib.crc32(p.encode()) / 2**33) for p in pieces()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,2}| ?\p{L}+|\s|[^\s\p{L}\d]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(f, normalized=False) for f in FRAMES])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=8192, padding_side="left",
    )  # fmt: skip


if __name__ == "__main__":
    build().save_pretrained(sys.argv[1])
