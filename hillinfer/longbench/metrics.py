"""Metrics of LongBench, identical to the official code, and of the other suites.

The official code is THUDM/LongBench at 2e00731f, LongBench/{metrics,eval}.py. Its quirks are reproduced, tested, and
documented in place. A metric takes the prediction, an answer and the row's classes; it returns a score in [0, 1].
"""

import re
import string
from collections import Counter
from functools import cache

from hillinfer.errors import UsageError
from hillinfer.longbench.tasks import Task

# ruff: noqa: RUF001
CHINESE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
CHINESE += "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
EXTRA = "pip install 'hillinfer[longbench]'"


def score(task: Task, prediction: str, answers: list[str], classes: list[str] | None = None) -> float:
    """The best score over all reference answers, after the task's post-processing of the prediction."""
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = METRICS[task.metric]
    if task.metric in MULTI_ANSWER:
        return metric(prediction, answers)
    return max((float(metric(prediction, answer, classes or [])) for answer in answers), default=0.0)


def qa_f1(prediction: str, answer: str, classes=()) -> float:
    """Bag-of-words F1. Punctuation is removed before articles, so "a.m." becomes the word "am"."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, classes=()) -> float:
    return _f1(_words_zh(prediction), _words_zh(answer))


def rouge(prediction: str, answer: str, classes=()) -> float:
    """ROUGE-L of the `rouge` package, which counts a repeated word once. 0 if it fails (on an empty text or ".")."""
    try:
        return _rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except Exception:  # the official code scores any failure as 0
        return 0.0


def rouge_zh(prediction: str, answer: str, classes=()) -> float:
    return rouge(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification(prediction: str, answer: str, classes: list[str]) -> float:
    """1/n if the answer is among the n classes found in the prediction, else 0.

    Substrings of the answer ("Sport" of "Sport event") are removed from the list during iteration, so the element after
    a removed one is skipped. This is a bug of the official code that affects scores.
    """
    found = [name for name in classes if name in prediction]
    for name in found:
        if name in answer and name != answer:
            found.remove(name)
    return 1.0 / len(found) if answer in found else 0.0


def retrieval(prediction: str, answer: str, classes=(), pattern: str = r"Paragraph (\d+)") -> float:
    return count(prediction, re.findall(pattern, answer)[0])


def retrieval_zh(prediction: str, answer: str, classes=()) -> float:
    return retrieval(prediction, answer, pattern=r"段落(\d+)")


def count(prediction: str, answer: str, classes=()) -> float:
    """Share of the numbers in the prediction that equal the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, answer: str, classes=()) -> float:
    """Edit similarity of the first line that is neither a comment nor a code fence, rounded to whole per cent.

    rapidfuzz matches fuzzywuzzy with python-Levenshtein installed; without it, fuzzywuzzy returns other values.
    """
    fuzz = _require("rapidfuzz.fuzz")
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, answer)) / 100


def choice(prediction: str, answer: str, classes=()) -> float:
    """LongBench v2: 1 if the letter after "The correct answer is" is the answer."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(found is not None and found[1] == answer)


def exact(prediction: str, answer: str, classes=()) -> float:
    """Exact match of the first line; for numeric answers, of the first number in that line."""
    line = prediction.strip().split("\n")[0].strip()
    if answer.isdigit():
        line = (re.findall(r"\d+", line) or [""])[0]
    return float(line == answer)


def last_number(prediction: str, answer: str, classes=()) -> float:
    """LongEval: 1 if the last number in the prediction is the answer."""
    numbers = re.findall(r"\d+", prediction)
    return float(bool(numbers) and int(numbers[-1]) == int(answer))


def share_of(prediction: str, answers: list[str]) -> float:
    """RULER's string_match_all: share of the reference answers found in the prediction, ignoring case."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def any_of(prediction: str, answers: list[str]) -> float:
    """RULER's string_match_part: 1 if any reference answer is found in the prediction."""
    return float(share_of(prediction, answers) > 0)


METRICS = {
    metric.__name__: metric
    for metric in (
        qa_f1, qa_f1_zh, rouge, rouge_zh, classification, retrieval, retrieval_zh, count, code_sim,
        choice, exact, last_number, share_of, any_of,
    )
}  # fmt: skip
MULTI_ANSWER = ("share_of", "any_of")  # metrics over all reference answers at once
REQUIRED = {"rouge": ["rouge"], "rouge_zh": ["rouge", "jieba"], "qa_f1_zh": ["jieba"], "code_sim": ["rapidfuzz.fuzz"]}


def check_libraries(tasks: list[Task]) -> None:
    """Raise UsageError for a metric whose package is not installed: before hours of work, not after."""
    for task in tasks:
        for name in REQUIRED.get(task.metric, ()):
            _require(name)


def _require(name: str):
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"the metrics of LongBench need {name.split('.')[0]}: {EXTRA}") from None


@cache
def _rouge():
    return _require("rouge").Rouge()


def _cut(text: str) -> list[str]:
    jieba = _require("jieba")
    jieba.setLogLevel("ERROR")  # jieba logs the loading of its dictionary to stderr
    return list(jieba.cut(text, cut_all=False))


def _words(text: str) -> list[str]:
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _words_zh(text: str) -> list[str]:
    drop = set(string.punctuation + CHINESE)
    words = ("".join("".join(ch for ch in word.lower() if ch not in drop).split()) for word in _cut(text))
    return [word for word in words if word]


def _f1(predicted: list[str], wanted: list[str]) -> float:
    same = sum((Counter(predicted) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(wanted)
    return 2 * precision * recall / (precision + recall)
