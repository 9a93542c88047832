"""The metrics equal the official code, including its quirks."""

import json
import os
from pathlib import Path

import pytest

from hillinfer.longbench.metrics import METRICS, exact, score
from hillinfer.longbench.tasks import find_task, longbench

for library in ("rapidfuzz", "rouge", "jieba"):
    pytest.importorskip(library, reason="pip install 'hillinfer[longbench]'")


def scored(task: str, prediction: str, *answers: str, classes=None) -> float:
    return score(find_task(task), prediction, list(answers), classes)


@pytest.mark.skipif("LONGBENCH_ROWS" not in os.environ, reason="LONGBENCH_ROWS names no folder with metric_cases.jsonl")
def test_official_scores_of_real_predictions():
    lines = (Path(os.environ["LONGBENCH_ROWS"]) / "metric_cases.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    assert len(cases) > 100 and len({case["task"] for case in cases}) == 20
    for case in cases:
        given = scored(case["task"], case["pred"], *case["answers"], classes=case["all_classes"])
        assert given == pytest.approx(case["score"], abs=1e-6), case


# What the official metrics.py (THUDM/LongBench at 2e00731f) gives, worked out by hand.
@pytest.mark.parametrize(
    ("task", "prediction", "answers", "wanted"),
    [
        ("hotpotqa", "The Old Mill.", ["old mill"], 1.0),  # articles, case and punctuation do not count
        ("hotpotqa", "A.M.", ["am"], 1.0),  # punctuation goes first: no article "a" is left
        ("hotpotqa", "cat cat dog", ["cat dog dog"], 2 / 3),  # bags of words, and not sets
        ("hotpotqa", "well-known", ["well known"], 0.0),  # a hyphen joins
        ("hotpotqa", "", ["x"], 0.0),
        ("hotpotqa", "the", ["a"], 0.0),  # nothing is left: 0, and no division by it
        ("hotpotqa", "\nno\nyes", ["yes"], 2 / 3),  # all lines count where the first-line rule is not
        ("triviaqa", "\n\nyes\nQuestion: no", ["yes"], 1.0),  # the first line alone, after leading line breaks
        ("triviaqa", " \nyes", ["yes"], 0.0),  # a leading space is no line break
        ("triviaqa", "b", ["a b c", "b"], 1.0),  # the best answer counts
        ("multifieldqa_zh", "河边，的村庄。", ["河边的村庄"], 1.0),  # noqa: RUF001
        ("passage_count", "There are 7, or 8", ["7"], 0.5),  # the share of all numbers
        ("passage_count", "17", ["7"], 0.0),
        ("passage_count", "none", ["7"], 0.0),
        ("passage_retrieval_en", "Paragraph 3, Paragraph 30", ["Paragraph 3"], 0.5),
        ("passage_retrieval_zh", "段落3", ["段落3"], 1.0),
        ("lcc", "```python\n# note\n// note\nx = 1\ny = 2", ["x = 1"], 1.0),  # the first line that is code
        ("lcc", "\n\nx = 1", ["x = 1"], 1.0),
        ("lcc", "# only\n`notes`", ["x = 1"], 0.0),
        ("lcc", "abcd", ["abed"], 0.75),
        ("lcc", "abc", ["abcdefgh"], 0.55),  # 54.5454 is rounded to whole per cents
        ("gov_report", "", ["text"], 0.0),  # the package raises
        ("gov_report", ".", ["text"], 0.0),
        ("gov_report", "the cat sat on the mat", ["the cat was on the mat"], 0.8),  # unique words: not 5/6
        ("samsum", "a b\nc d", ["a b"], 1.0),
        ("vcsum", "河边的村庄", ["河边的村庄"], 1.0),
        ("longbench-v2", "**The correct answer is (B)**", ["B"], 1.0),
        ("longbench-v2", "The correct answer is B", ["B"], 1.0),
        ("longbench-v2", "B", ["B"], 0.0),
        ("longeval_200", "line 5 has 12345", ["12345"], 1.0),  # the last number
        ("longeval_200", "12345 of line 5", ["12345"], 0.0),
        ("ruler_niah_multivalue", "11 and 22", ["11", "22", "33"], 2 / 3),
        ("ruler_qa_1", "It is PARIS", ["Lyon", "paris"], 1.0),
    ],
)
def test_each_trap(task, prediction, answers, wanted):
    assert scored(task, prediction, *answers) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "gold", "wanted"),
    [
        ("Sport event", "Sport event", 1.0),  # "Sport" is part of the gold and taken out
        ("Sport", "Sport", 1.0),
        ("Sport event, Food", "Sport event", 0.5),
        ("Sport event", "Sport", 0.5),
        ("Food\nSport event", "Food", 1.0),  # the first line alone
        ("", "Food", 0.0),
    ],
)
def test_classification(prediction, gold, wanted):
    assert scored("trec", prediction, gold, classes=["Sport", "Sport event", "Food", "Date"]) == wanted


def test_classification_keeps_the_official_slip():
    """Two parts of the gold in a row: the second is skipped while the list shrinks, and halves the score."""
    assert scored("trec", "abc", "abc", classes=["a", "b", "abc"]) == 0.5


@pytest.mark.parametrize(
    ("text", "right"), [("40064", True), ("<40064>", True), ("40065", False), ("140064", False), ("no\n40064", False)]
)
def test_exact_takes_the_first_number(text, right):
    assert exact(text, "40064") == right


def test_every_task_has_a_metric_that_takes_an_empty_answer():
    assert {task.metric for task in longbench().values()} <= set(METRICS)
    for task in longbench().values():
        answer = {"retrieval": "Paragraph 1", "retrieval_zh": "段落1"}.get(task.metric, "1")
        assert score(task, "", [answer], ["1"]) == 0.0
