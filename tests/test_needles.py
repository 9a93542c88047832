"""Needles in a novel are fair questions, and an answer that is forced is judged as one that is given."""

import re

import pytest

from hillinfer import UsageError
from hillinfer.assets import load_embedded
from hillinfer.longbench.comparison import demo_records
from hillinfer.longbench.forced import force_each
from hillinfer.longbench.needles import make_needles, needle_prompt
from hillinfer.longbench.runner import ask_each, synthetic_prompt
from hillinfer.systems.registry import find_system


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


def test_half_a_name_never_suffices_and_the_facts_lie_at_all_depths(embedded):
    tokenizer, depths = embedded[1], []
    records = make_needles(tokenizer, 2000, 10)
    for record in records:
        facts = dict(re.findall(r"The code of the (\w+ \w+) is (\d{5})\.", record["context"]))
        assert record["answers"] == [facts[record["key"]]] and len(set(facts.values())) == 4
        for word in record["key"].split():
            assert sum(word in key.split() for key in facts) == 2
        prompt, gold = needle_prompt(tokenizer, record)
        assert len(prompt.ids) + len(gold) <= 2000
        assert tokenizer.decode(prompt.ids + gold).endswith(
            f"The code of the {record['key']} is {record['answers'][0]}"
        )
        assert tokenizer.decode(prompt.ids[: prompt.document]).count("The code of the") == 4  # no hint in the prefill
        depths.append(record["context"].index(f"The code of the {record['key']}") / len(record["context"]))
    assert min(depths) < 0.15 and max(depths) > 0.85 and len({round(depth, 1) for depth in depths}) > 5
    assert records == make_needles(tokenizer, 2000, 10) != make_needles(tokenizer, 2000, 10, seed=1)


@pytest.mark.parametrize("tokens", [100, 10**6])
def test_a_length_that_the_novel_cannot_give(embedded, tokens):
    with pytest.raises(UsageError, match="prompts of 800 to"):
        make_needles(embedded[1], tokens, 1)


def test_a_forced_answer_is_right_where_a_greedy_one_is(embedded):
    """And `full` is faithful to itself, a window is not."""
    model, tokenizer = embedded
    record = demo_records({"lines_2k": 1})[0]
    prompt = synthetic_prompt(tokenizer, record)[1]
    gold = tokenizer(record["answers"][0], add_special_tokens=False).input_ids
    ways = {name: (name, {"alpha": 0.1}) for name in ("full", "topk", "streaming", "h2o")}
    forced = {found.variant: found for found in force_each(model, tokenizer, prompt, gold, ways)}
    greedy = ask_each(*embedded, record, {name: _policy(*way) for name, way in ways.items()})
    for name, found in forced.items():
        assert found.right == greedy[name].text.startswith(record["answers"][0]), name
        assert (found.answer.attended, found.answer.cached) == pytest.approx(
            (greedy[name].attended, greedy[name].cached), 0.01
        )
    assert (forced["full"].kl, forced["full"].agree) == (0, 1)
    assert 0 < forced["topk"].kl < forced["streaming"].kl and forced["full"].right and not forced["streaming"].right


def _policy(name: str, options: dict):
    system, settings = find_system(name, options)
    return system.policy, settings
