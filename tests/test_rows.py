"""Several ways as rows of one decode: each goes its own way, as if alone; and fidelity, measured on such rows."""

import threading
from contextlib import ExitStack

import pytest
import torch
from transformers import DynamicCache

from benchmarks.tiny_models import build
from hillinfer import Settings, make_cache
from hillinfer.assets import load_embedded
from hillinfer.cache import TieredCache
from hillinfer.longbench.fidelity import force, reference_ids
from hillinfer.longbench.prefilled import Prefilled
from hillinfer.longbench.runner import ask_each, feed, prefill, synthetic_prompt
from hillinfer.longbench.synthetic import make_records
from hillinfer.longbench.tasks import find_task
from hillinfer.models.rows import as_batch
from hillinfer.systems.registry import POLICIES


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


@pytest.fixture(scope="module")
def record():
    return make_records("chain", 384, 1, seed=5)[0]  # long answers: ways part, and end at different steps


WAYS = {
    f"{name} {alpha}": (POLICIES[name], Settings(alpha=alpha))
    for name in POLICIES
    for alpha in (0.1, 0.4)
    if alpha == 0.1 or name in ("topk", "quest", "full")
}


def test_each_row_answers_as_if_alone(embedded, record):
    before = set(threading.enumerate())
    together = ask_each(*embedded, record, WAYS)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("hillinfer-row")]
    texts = {answer.text for answer in together.values()}
    assert len(texts) > 3 and len({answer.new_tokens for answer in together.values()}) > 1
    for name in ("topk 0.1", "h2o 0.1", "quest 0.4"):
        alone = ask_each(*embedded, record, {name: WAYS[name]})[name]
        row = together[name]
        assert (row.text, row.steps, row.attended, row.cached, row.rates) == (
            *(alone.text, alone.steps, alone.attended, alone.cached, alone.rates),
        ), name


def open_all(stack: ExitStack, model, source: Prefilled, ways: dict) -> list[TieredCache]:
    caches = [stack.enter_context(TieredCache(model.config, *way)) for way in ways.values()]
    for cache in caches:
        source.fill(cache, model.device)
    return caches


def test_an_ended_row_stays_as_it_is(embedded, record):
    model = embedded[0]
    source = prefill(model, synthetic_prompt(embedded[1], record)[1])
    with ExitStack() as stack, torch.inference_mode():
        caches = open_all(stack, model, source, {name: WAYS[name] for name in ("full 0.1", "topk 0.1", "quest 0.4")})
        rows, before = stack.enter_context(as_batch(caches)), source.get_seq_length()
        feed(model, rows, [5], batch=3)
        rows.ended[1] = True
        feed(model, rows, [6, 7][:1], batch=3)
        assert [cache.get_seq_length() - before for cache in caches] == [2, 1, 2]
        assert rows.get_seq_length() == before + 2


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "gpt_oss"])
def test_layers_that_are_not_tiered_have_a_row_each_too(family):
    """Sliding windows and recurrent states differ by row as soon as the rows' tokens do."""
    model = build(family)
    ids = torch.randint(5, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    source = Prefilled(model.config)
    with torch.inference_mode(), ExitStack() as stack:
        model(ids, past_key_values=source)
        ways = {"full": (POLICIES["full"], Settings()), "topk": (POLICIES["topk"], Settings(alpha=1.0))}
        rows = stack.enter_context(as_batch(open_all(stack, model, source, ways)))
        for step in range(12):
            tokens = torch.tensor([[7 + step], [90 + step]])
            logits = model(tokens, past_key_values=rows).logits[:, -1]
        for row, first in enumerate((7, 90)):
            cache = DynamicCache(config=model.config)
            more = torch.arange(first, first + 12)[None]
            model(ids, past_key_values=cache)
            for at in range(12):
                want = model(more[:, at : at + 1], past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(logits[row], want, atol=2e-4, rtol=1e-4)


def test_fidelity_is_what_the_definition_says(embedded, record):
    model, tokenizer = embedded
    prompt = synthetic_prompt(tokenizer, record)[1]
    source, rest = prefill(model, prompt), prompt.ids[prompt.document :]
    gold = reference_ids(tokenizer, find_task("chain_1k"), prompt, record["answers"], 8)
    ways = {name: WAYS[name] for name in ("full 0.1", "topk 0.4", "streaming 0.1")}
    with ExitStack() as stack, torch.inference_mode():
        found = force(model, open_all(stack, model, source, ways), rest, gold)
    with ExitStack() as stack, torch.inference_mode():
        logits = []
        for cache in open_all(stack, model, source, ways):
            steps = [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in rest + gold[:-1]]
            logits.append(torch.stack(steps[len(rest) - 1 :]).log_softmax(-1))
    for each, own in zip(found, logits, strict=True):
        kl = (logits[0].exp() * (logits[0] - own)).sum(-1)
        torch.testing.assert_close(torch.tensor(each.kl), kl, atol=1e-4, rtol=1e-3)
        assert each.agree == (own.argmax(-1) == logits[0].argmax(-1)).int().tolist()
        picked = torch.tensor(gold)[:, None]
        nll = (logits[0].gather(1, picked) - own.gather(1, picked))[:, 0]
        torch.testing.assert_close(torch.tensor(each.nll), nll, atol=1e-4, rtol=1e-3)
    full, topk, streaming = found
    assert max(full.kl) < 1e-6 and full.mass == full.attended == 1.0
    assert topk.attended == pytest.approx(0.4, abs=0.01) and streaming.mass < topk.mass < 1
    assert sum(topk.kl) < sum(streaming.kl)


def test_full_may_write_its_own_answer(embedded, record):
    """Without a given answer, all are forced on the first cache's greedy one, up to its end."""
    model, tokenizer = embedded
    prompt = synthetic_prompt(tokenizer, record)[1]
    source, ways = prefill(model, prompt), {name: WAYS[name] for name in ("full 0.1", "topk 0.4")}
    with ExitStack() as stack, torch.inference_mode():
        found = force(model, open_all(stack, model, source, ways), prompt.ids[prompt.document :], None, tokens=200)
    own = ask_each(*embedded, record, {"full": WAYS["full 0.1"]})["full"]
    assert len(found[0].kl) == own.new_tokens and set(found[0].agree) == {1}


def test_exact_fallback_families_step_alone():
    model = build("deepseek_v3")
    with ExitStack() as stack, pytest.raises(Exception, match="one at a time"):
        stack.enter_context(as_batch([stack.enter_context(make_cache(model, "full")) for _ in range(2)]))
