"""The observer records exactly the run's attention, and does not affect the run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hillinfer import make_cache
from hillinfer.attention import Observed, attention_weights
from hillinfer.workbench import observe
from hillinfer.workbench.observe import SHARE, AttentionRecord, block_size

SYSTEMS = {"full": {}, "topk": {"alpha": 0.3}, "hillinfer": {"alpha": 0.3, "drive": "folder"}}


def generate(model, prompt, record, system, options, tmp_path, tokens=8):
    options = options | ({"drive": tmp_path} if "drive" in options else {})
    with make_cache(model, system, sinks=2, recent=4, **options) as cache:
        cache.run.observer = record
        out = model.generate(prompt, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return out, cache


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
def test_watching_changes_nothing_and_adds_up(models, prompt, tmp_path, system, exact):
    model, record = models("llama"), AttentionRecord(blocks=16, exact=exact)
    plain, _ = generate(model, prompt, None, system, SYSTEMS[system], tmp_path)
    seen, cache = generate(model, prompt, record, system, SYSTEMS[system], tmp_path)
    assert torch.equal(plain, seen)
    rows = {(row.step, row.layer): row for row in cache.counters.rows}
    assert {(step, layer) for step, layers in record.steps.items() for layer in layers} == set(rows)
    for step, layers in record.steps.items():
        for layer, part in layers.items():
            row = rows[step, layer]
            assert part.n == row.cached and part.chosen.sum() == pytest.approx(row.attended / cache.run.heads)
            assert len(part.chosen) == part.mass.shape[1] <= 16 and part.block * len(part.chosen) >= part.n
            np.testing.assert_allclose(part.mass.sum(1, dtype=float), 1, atol=5e-3)
            assert ((part.needed >= 1) & (part.needed <= row.cached)).all()
            assert (part.recall is not None) == exact
            if exact and system == "full":
                np.testing.assert_allclose(part.recall, 1, atol=1e-5)
            elif exact:
                assert (part.recall < 1).all() and (part.recall > 0).all()


def test_weights_and_blocks_are_those_of_plain_attention():
    torch.manual_seed(1)
    query, keys, n = torch.randn(4, 16), torch.randn(50, 2, 16), 50
    visible = torch.ones(n, dtype=torch.bool)
    visible[:5] = False
    want = torch.empty(4, n)
    for head in range(4):
        logits = keys[:, head // 2] @ query[head] * 0.25
        want[head] = logits.masked_fill(~visible, -torch.inf).softmax(0)
    got = attention_weights(query, keys, 0.25, visible)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    record = AttentionRecord(blocks=8)
    assert record.should_observe(0, 3)
    record.observe(Observed(0, 3, query, keys, None, n, 0.25, visible, lambda: keys))
    part = record.steps[3][0]
    blocks = [want[:, i : i + 8].sum(1) for i in range(0, n, 8)]
    np.testing.assert_allclose(part.mass, torch.stack(blocks, 1), atol=1e-3)
    best = want.sort(1, descending=True).values.cumsum(1)
    assert part.needed.tolist() == [int((row < SHARE).sum()) + 1 for row in best]


def test_blocks_are_few_and_stay_while_a_text_grows():
    assert [block_size(n, 256) for n in (1, 256, 257, 512, 513, 100_000)] == [1, 1, 2, 2, 4, 512]


def test_a_budget_leaves_steps_out_and_counts_them(models, prompt, tmp_path, monkeypatch):
    record = AttentionRecord(budget=0.0)
    generate(models("llama"), prompt, record, "full", {}, tmp_path)
    assert len(record.steps) == 1 and record.skipped == 7 - len(record.steps)  # of 8 tokens the first is prefill's
    monkeypatch.setattr(observe, "KEEP", 3000)
    short = AttentionRecord()
    generate(models("llama"), prompt, short, "full", {}, tmp_path)
    assert 0 < len(short.steps) < 7 and len(short.steps) + short.skipped == 7
    assert max(short.steps) == max(range(1, 8))  # the newest are kept
    step, layers = short.snapshots_at()
    assert step == 7 and set(layers) == {0, 1, 2} and short.snapshots_at(0)[0] == min(short.steps)


def test_a_look_costs_what_its_step_took_longer(monkeypatch):
    """Not only the time in `observe`: an observed step cannot attend to records in place."""
    now = [0]
    monkeypatch.setattr(observe, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))
    record, looks = AttentionRecord(budget=0.1), 0
    for step in range(1000):
        on = record.should_observe(0, step)
        assert record.should_observe(0, step) == on  # it is asked more than once
        looks, record._took = looks + on, record._took + on  # 1 in `observe`, 10 in all
        now[0] += 20 if on else 10
    assert looks + record.skipped == 1000 and looks * 10 / now[0] == pytest.approx(0.1, abs=0.01)
