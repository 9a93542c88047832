"""The defining property of each baseline."""

import numpy as np
import pytest
import torch

import hillinfer
from hillinfer.systems.baselines import H2O, InfiniGen, Quest, SnapKV
from hillinfer.systems.baselines.quest import QuestDense
from hillinfer.systems.baselines.released import LeoAMReleased

NEW = dict(max_new_tokens=16, do_sample=False, num_beams=1)


def step(n: int, budget: int, **more) -> hillinfer.Step:
    return hillinfer.Step(n, budget, sinks=2, recent=3, layer=0, step=0, scores=None, weights=None, **more)


def chosen(policy, *sizes, row: int = 0, **more) -> np.ndarray | None:
    """One row's positions that count."""
    found = policy.choose(step(*sizes, **more))
    if found is None:
        return None
    positions, counts = found
    return (positions[row] if counts is None else positions[row][counts[row]]).numpy()


def attention(queries, keys, scaling) -> torch.Tensor:
    """Causal weights (B, H, q, n), the plain way."""
    n, q, group = keys.shape[2], queries.shape[2], queries.shape[1] // keys.shape[1]
    logits = queries @ keys.repeat_interleave(group, 1).transpose(2, 3) * scaling
    return logits.masked_fill(torch.ones(q, n).tril(n - q) == 0, -torch.inf).softmax(-1)


@pytest.fixture
def prefill():
    torch.manual_seed(3)
    return torch.randn(2, 4, 300, 8), torch.randn(2, 2, 300, 8)


def test_h2o_adds_up_the_attention_and_evicts_for_good(prefill):
    queries, keys = prefill
    policy = H2O()
    policy.start(2, 2, 8)
    policy.append(keys)
    policy.observe(queries, keys, None, 0.3)
    want = attention(queries, keys, 0.3).sum((1, 2)).numpy()
    np.testing.assert_allclose(policy.worth, want, rtol=1e-4, atol=1e-4)
    first = chosen(policy, 300, 40, row=1)
    heavy = np.sort(np.argsort(-want[1, :280], kind="stable")[:20])
    np.testing.assert_array_equal(first, np.append(heavy, np.arange(280, 300)))
    policy.attended(torch.from_numpy(first).expand(2, -1), torch.full((2, 4, 40), 0.25))
    np.testing.assert_allclose(policy.worth[1], want[1, first] + 1, rtol=1e-4)
    policy.append(keys[:, :, :1])
    again = chosen(policy, 301, 60, row=1)  # a larger budget brings nothing back
    np.testing.assert_array_equal(again, np.append(first, 300))


def test_padding_has_no_weight(prefill):
    queries, keys = prefill
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, :90] = False
    policy = H2O()
    policy.start(2, 2, 8)
    policy.append(keys)
    policy.observe(queries, keys, valid, 0.3)
    want = attention(queries[1:, :, 90:], keys[1:, :, 90:], 0.3).sum((0, 1, 2)).numpy()
    np.testing.assert_allclose(policy.worth[1, 90:], want, rtol=1e-4, atol=1e-4)
    assert chosen(policy, 300, 40, row=1, valid=valid)[0] >= 90


def test_snapkv_keeps_what_the_last_queries_want_and_what_comes_later(prefill):
    queries, keys = prefill
    keys[0, :, 100] = 4 * queries[0, ::2, -16:].mean(1)
    policy = SnapKV()
    policy.start(2, 2, 8)
    policy.append(keys)
    policy.observe(queries, keys, None, 0.3)
    picked = chosen(policy, 300, 60)
    assert {100, *range(268, 300)} <= set(picked.tolist()) and len(picked) == 60
    policy.append(keys[:, :, :1])
    later = chosen(policy, 301, 60)
    assert 300 in later and set(later.tolist()) <= {*picked.tolist(), 300}


def test_quest_takes_the_pages_of_highest_bound():
    keys = torch.zeros(1, 2, 100, 8)
    keys[0, 0, 37, 3], keys[0, 1, 70, 5] = 9, -7
    policy = Quest()
    policy.start(1, 2, 8)
    policy.append(keys[:, :, :50])
    policy.append(keys[:, :, 50:])
    query = torch.zeros(4, 8)
    query[0, 3], query[2, 5] = 1, -1
    picked = chosen(policy, 100, 40, query=query[None])
    np.testing.assert_array_equal(picked, [0, 1, *range(32, 48), *range(64, 80), 97, 98, 99])


def test_infinigen_with_all_columns_takes_what_the_heads_give_most(prefill):
    queries, keys = prefill

    class AllColumns(InfiniGen):
        ratio = 1.0

    policy = AllColumns()
    policy.start(2, 2, 8)
    policy.append(keys[:, :, :200])
    policy.observe(queries[:, :, :200], keys[:, :, :200], None, 1.0)
    policy.append(keys[:, :, 200:])
    query = queries[:, :, -1]
    picked = chosen(policy, 300, 50, query=query, scaling=1.0)
    weights = attention(query[:1, :, None], keys[:1], 1.0)[0, :, 0].amax(0)
    weights[[0, 1, 297, 298, 299]] = 2  # the device window
    assert set(picked.tolist()) == set(weights.topk(50).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_drive_attends_exactly(models, prompt, tmp_path, dtype):
    """One step on the drive against attention over everything in memory, for a padded batch; and what it cost."""
    model = models("qwen3")
    ids = torch.cat((prompt, prompt.flip(1)))
    ids[1, :60] = 0
    mask, out = (ids != 0).long(), {}
    model.to(dtype)
    for system, options in (("full", {}), ("instattention", dict(drive=tmp_path))):
        with hillinfer.make_cache(model, system, **options) as cache, torch.inference_mode():
            model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
            out[system] = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits.float()
            if options:
                report, spans = cache.run.drive.report()["attend"], cache.timeline.frame()
                assert cache.memory()["codes"] == 0 and report.calls == 2 * model.config.num_hidden_layers
                assert report.nand_bytes > 0.5 * 150 * cache.run.geometry.record_bytes and report.modelled_s > 0
                assert report.link_bytes < 0.2 * report.nand_bytes  # outputs travel, records do not
                assert set(spans[spans.lane == "drive"].kind) >= {"attend"} and not (spans.kind == "read").any()
    model.to(torch.float32)
    torch.testing.assert_close(
        out["instattention"],
        out["full"],
        **dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.1, atol=0.1),
    )


def test_quest_dense_attends_to_all_in_the_first_two_layers():
    policy, picked = QuestDense(), []
    policy.start(1, 2, 8)
    policy.append(torch.randn(1, 2, 100, 8))
    for layer in range(3):
        given = step(100, 40, query=torch.ones(1, 4, 8))
        given.layer = layer
        picked.append(policy.choose(given))
    assert picked[0] is picked[1] is None and picked[2][1].sum() <= 40


def test_the_released_leoam_takes_tokens_of_the_best_chunks():
    keys = torch.zeros(1, 2, 512, 8)
    keys[0, 0, 140, 3], keys[0, 1, 300:310, 5] = 9, -7
    policy = LeoAMReleased()
    policy.start(1, 2, 8)
    policy.append(keys)
    query, ranks = torch.zeros(4, 8), np.zeros(512, np.int32)
    query[0, 3], query[2, 5], ranks[[20, 143, 300, 301]] = 1, -1, 5  # token 20 is of another chunk
    for layer, size in ((0, 8), (2, 128)):
        given = step(512, 52, query=query)
        given.layer, given.scores = layer, lambda: ranks
        picked = set(policy.select(given).tolist())
        assert given.notes["chunks"] == -(-2 * 52 // size) and {0, 1, 143, 511} <= picked
        assert ({300, 301} <= picked) == (layer == 0)  # of one chunk of 128 the best bound decides
