"""Greedy `generate` with a budget that covers everything equals DynamicCache, token for token, whatever the tier."""

import pytest
import torch
from transformers import DynamicCache

import hillinfer
from hillinfer import Settings, TieredCache, UsageError
from hillinfer.evaluator.policies import TopK
from tests.conftest import FAMILIES

NEW = 24
TIERS = ("host", "drive", "drive-small-pool")


def cache_for(model, tier, tmp_path, alpha=1.0, policy=TopK):
    """A tiered cache on that tier; the small pool makes most reads come from the drive."""
    drive = None if tier == "host" else tmp_path
    config = model.config
    settings = Settings(alpha=alpha, drive=drive)
    if tier == "drive-small-pool":
        settings = Settings(alpha=alpha, drive=drive, recent=1, sinks=0)
    cache = TieredCache(config, policy, settings, sliding_ok=True)
    if tier == "drive-small-pool":
        cache.run.pool_tokens = lambda n: 8
    return cache


@pytest.fixture(params=list(FAMILIES))
def model(request, models):
    return models(request.param)


def reference(model, ids, **kw):
    return model.generate(ids, past_key_values=DynamicCache(config=model.config), **generation(kw))


known = {}  # what `wanted` has computed


def wanted(model, ids, **kw):
    """`reference`, once for all tiers and tests that ask for the same."""
    key = model, str((ids.tolist(), kw))
    if key not in known:
        known[key] = reference(model, ids, **kw)
    return known[key]


def tiered(model, ids, cache, **kw):
    return model.generate(ids, past_key_values=cache, **generation(kw))


def generation(kw):
    return {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1} | kw


@pytest.mark.parametrize("tier", TIERS)
class TestEqualsDynamicCache:
    def test_one_prompt(self, model, prompt, tier, tmp_path):
        want = wanted(model, prompt)
        with cache_for(model, tier, tmp_path) as cache:
            assert torch.equal(tiered(model, prompt, cache), want)
            if tier == "drive-small-pool" and cache.run.layers:
                assert cache.counters.rates()["drive"] > 0.8  # so the equality above is about the drive

    def test_left_padded_batch(self, model, prompt, tier, tmp_path):
        ids = torch.cat((prompt, prompt.flip(1)))
        ids[1, :60] = 0
        mask = (ids != 0).long()
        want = wanted(model, ids, attention_mask=mask)
        with cache_for(model, tier, tmp_path) as cache:
            assert torch.equal(tiered(model, ids, cache, attention_mask=mask), want)

    def test_chunked_prefill(self, model, prompt, tier, tmp_path):
        want = wanted(model, prompt, prefill_chunk_size=40)
        with cache_for(model, tier, tmp_path) as cache:
            assert torch.equal(tiered(model, prompt, cache, prefill_chunk_size=40), want)

    def test_second_turn(self, model, prompt, tier, tmp_path):
        kept = DynamicCache(config=model.config)
        first = model.generate(prompt, past_key_values=kept, **generation({}))
        turn = torch.cat((first, prompt[:, :20]), 1)
        want = model.generate(turn, past_key_values=kept, **generation({}))
        with cache_for(model, tier, tmp_path) as cache:
            assert torch.equal(tiered(model, prompt, cache), first)
            assert torch.equal(tiered(model, turn, cache), want)

    def test_crop(self, model, prompt, tier, tmp_path):
        if "sliding" in model.config.model_type or getattr(model.config, "sliding_window", None):
            pytest.skip("transformers cannot crop a full sliding window")
        want = wanted(model, prompt)
        with cache_for(model, tier, tmp_path) as cache:
            out = tiered(model, prompt, cache)
            for cut in (cache.get_seq_length() - prompt.shape[1] + 3, 50):  # into the prompt, then further
                cache.crop(-cut)
                out = tiered(model, prompt, cache)
            assert torch.equal(out, want)
            cache.crop(100)  # the older form: keep 100
            assert cache.get_seq_length() == 100
            assert torch.equal(tiered(model, prompt, cache), want)

    def test_reset(self, model, prompt, tier, tmp_path):
        want = wanted(model, prompt)
        with cache_for(model, tier, tmp_path) as cache:
            tiered(model, prompt, cache)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.equal(tiered(model, prompt, cache), want)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("policy", list(hillinfer.POLICIES))
def test_every_policy_runs_at_a_tenth(model, prompt, tier, policy, tmp_path):
    """Padded batch, chunked prefill, a second turn and a crop, all with alpha 0.1."""
    ids = torch.cat((prompt, prompt.flip(1)))
    ids[1, :60] = 0
    mask = (ids != 0).long()
    with cache_for(model, tier, tmp_path, alpha=0.1, policy=hillinfer.POLICIES[policy]) as cache:
        out = tiered(model, ids, cache, attention_mask=mask, prefill_chunk_size=64)
        assert out.shape == (2, prompt.shape[1] + NEW)
        if not getattr(model.config, "sliding_window", None):
            cache.crop(-30)
        mask = torch.cat((mask, mask.new_ones((2, NEW))), 1)
        tiered(model, out, cache, attention_mask=mask)
        decode = cache.counters.rows
        assert all(row.device + row.host + row.drive == row.queries for row in decode)
        if hillinfer.POLICIES[policy].selects:
            assert all(row.attended <= 2 * 40 for row in decode)


def test_beams_in_memory_equal(models, prompt):
    model = models("llama")
    want = reference(model, prompt, num_beams=3)
    with cache_for(model, "host", None) as cache:
        assert torch.equal(tiered(model, prompt, cache, num_beams=3), want)


def test_beams_on_the_drive_are_refused(models, prompt, tmp_path):
    model = models("llama")
    with cache_for(model, "drive", tmp_path) as cache, pytest.raises(UsageError, match="num_beams=1"):
        tiered(model, prompt, cache, num_beams=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_a_model_keeps_its_own_attention(models, prompt, other):
    model = models("llama")
    model.set_attn_implementation(other)
    try:
        want = reference(model, prompt)
        with cache_for(model, "host", None) as cache:
            assert torch.equal(tiered(model, prompt, cache), want)
        assert model.config._attn_implementation == other
        assert torch.equal(reference(model, prompt), want)
    finally:
        model.set_attn_implementation("sdpa")


def test_enable_and_disable_switch_nothing(models):
    model = models("llama")
    before = hillinfer.enable(model)
    hillinfer.disable(model, before)
    assert model.config._attn_implementation == before == "sdpa"
