"""The runner asks all systems the same questions, and its measurements are correct."""

import pytest
import torch

from hillinfer import Settings, make_cache
from hillinfer.assets import load_embedded
from hillinfer.longbench.comparison import demo_records
from hillinfer.longbench.runner import ask, ask_each, decode, feed, is_right, measured, synthetic_prompt
from hillinfer.longbench.synthetic import prompt_of
from hillinfer.systems.registry import POLICIES


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


@pytest.fixture(scope="module")
def record():
    return demo_records({"lines_2k": 1})[0]


def test_a_split_prompt_is_the_prompt(embedded, record):
    tokenizer = embedded[1]
    prompt = synthetic_prompt(tokenizer, record)[1]
    assert tokenizer.decode(prompt.ids, skip_special_tokens=True) == prompt_of(record)
    assert tokenizer.decode(prompt.ids[: prompt.document]).endswith(record["context"])
    assert prompt.document > 1000 and len(prompt.ids) - prompt.document < 40 and not prompt.truncated


def test_one_prefill_serves_all_systems_exactly(embedded, record, tmp_path):
    """Answers over a shared prefill equal those of separate caches, even after a policy that attended to few tokens."""
    ways = {
        "random": (POLICIES["random"], Settings(alpha=0.05)),
        "full": (POLICIES["full"], Settings()),
        "topk": (POLICIES["topk"], Settings(alpha=0.1)),
        "streaming": (POLICIES["streaming"], Settings(alpha=0.1)),
    }
    shared = ask_each(*embedded, record, ways)
    for name, (_, settings) in ways.items():
        with make_cache(embedded[0].config, name, alpha=settings.alpha) as cache:
            own = ask(*embedded, record, cache)
        assert (shared[name].text, shared[name].attended) == (own.text, own.attended), name
    assert is_right(record, shared["full"].text)
    assert not is_right(record, shared["random"].text)


def test_a_shared_prefill_has_the_precision_that_was_asked_for(embedded, record):
    """INT4 codes take half the bytes of INT8."""
    ways = {p: (POLICIES["topk"], Settings(precision=p)) for p in ("int8", "int4")}
    size = {name: answer.memory["codes"] for name, answer in ask_each(*embedded, record, ways).items()}
    assert size["int4"] == pytest.approx(size["int8"] / 2, rel=0.02)


def test_figures_add_up(embedded, record, tmp_path):
    with make_cache(embedded[0].config, "hillinfer", alpha=0.2, drive=tmp_path) as cache:
        answer = ask(*embedded, record, cache)
        assert answer.attended == pytest.approx(0.2 * answer.cached, abs=1)
        assert sum(answer.rates.values()) == pytest.approx(1)
        assert answer.steps >= answer.new_tokens + 3
        assert answer.drive_bytes_per_token > 0
        assert answer.memory["host"] < cache.run.geometry.record_bytes * 6 * answer.cached * 0.55


@pytest.mark.parametrize(
    ("text", "right"), [("40064", True), ("<40064>", True), ("40065", False), ("140064", False), ("", False)]
)
def test_an_answer_is_its_first_number(text, right):
    assert is_right({"answers": ["40064"]}, text) == right
    assert not is_right({"answers": ["40064"]}, "no\n40064")
    words = {"answers": ["12 leads to red-fox: number 7"]}
    assert is_right(words, " 12 leads to red-fox: number 7\n") and not is_right(words, "12 leads to red-fox: number 8")


@pytest.mark.parametrize("chunk", [2, 7, 64, 99, 100, 1000])
def test_prefill_in_chunks_is_the_same_prefill(models, prompt, tmp_path, chunk):
    """Even if the last chunk would be a single token, which would be an inexact decode step."""
    model, logits = models("llama"), []
    ids = prompt[0, :100].tolist()
    for size in (None, chunk):
        with make_cache(model, "hillinfer", alpha=0.1, drive=tmp_path) as cache:
            feed(model, cache, ids, size)
            assert cache.get_seq_length() == 100 and not cache.counters.rows  # nothing was selected
            with torch.inference_mode():
                logits.append(model(prompt[:, 100:110], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_attended_tokens_are_those_of_one_sequence(models, prompt):
    model = models("llama")
    with make_cache(model, "topk", alpha=0.5) as cache:
        decode(model, cache, prompt[0].tolist(), 4, num_beams=3)
        figures = measured(cache, 0.0, 1.0)
    assert 0 < figures["attended"] <= 0.6 * figures["cached"]
