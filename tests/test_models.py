"""What families need of a cache: sinks, unequal K and V, exact attention, true refusals; a model is never switched."""

import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    DeepseekV3Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    T5Config,
)

import hillinfer
from hillinfer import Settings, UsageError
from hillinfer.evaluator.policies import Full, TopK
from hillinfer.layer import Layer
from hillinfer.models import lookahead
from hillinfer.models.support import check_supported
from hillinfer.run import Run
from hillinfer.systems.planning import plan

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def filled(dims=(16, 16), batch=1, policy=Full) -> tuple[Layer, torch.Tensor, torch.Tensor]:
    layer = Layer(0, policy(), Run(Settings(alpha=1.0), 1))
    keys, values = (torch.randn(batch, 2, 40, dim) for dim in dims)
    layer.append(keys, values)
    return layer, keys, values


@pytest.mark.parametrize("dims", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_with_sinks_over_keys_and_values_of_other_widths(dims, sinks):
    torch.manual_seed(3)
    layer, keys, values = filled(dims)
    sink = torch.randn(4) if sinks else None
    query = torch.randn(1, 4, 1, dims[0])
    logits = query.view(1, 2, 2, dims[0]) @ keys.transpose(2, 3) * 0.2
    if sinks:
        logits = torch.cat((logits, sink.view(1, 2, 2, 1)), 3)
    weights = logits.softmax(-1)[..., :40]
    got = layer.attend(query, None, 0.2, sinks=sink)
    torch.testing.assert_close(got, (weights @ values).reshape(1, 1, 4, dims[1]), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(layer.everything(), (keys, values), strict=True))


@pytest.mark.parametrize("changed", ["batch", "heads", "channels", "dtype"])
def test_other_keys_than_the_cache_holds_are_refused(changed):
    layer, *_ = filled(policy=TopK, batch=2)
    shape = {"batch": (3, 2, 1, 16), "heads": (2, 4, 1, 16), "channels": (2, 2, 1, 8)}.get(changed, (2, 2, 1, 16))
    new = torch.randn(shape, dtype=torch.bfloat16 if changed == "dtype" else torch.float32)
    with pytest.raises(UsageError, match="this cache holds 2 sequences of 2 KV heads x 16"):
        layer.append(new, new)
    assert layer.n == 40 and layer.pieces == [40]


@pytest.mark.parametrize("system", ["full", "topk", "hillinfer", "flexgen"])
@pytest.mark.parametrize("batches", [(1, 4), (4, 1)])
def test_another_batch_is_one_error(models, prompt, tmp_path, system, batches):
    model, (first, then) = models("llama"), batches
    drive = {"drive": tmp_path} if system in ("hillinfer", "flexgen") else {}
    with hillinfer.make_cache(model, system, **drive) as cache, torch.no_grad():
        model(prompt.repeat(first, 1), past_key_values=cache)
        with pytest.raises(UsageError, match="use a new cache"):
            model(prompt[:, :1].repeat(then, 1), past_key_values=cache)


def test_repeating_sequences_twice_doubles_twice(models, prompt):
    model = models("llama")
    with hillinfer.make_cache(model, "full") as cache, torch.no_grad():
        model(prompt, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_repeat_interleave(2)
        assert cache.tiered[0].everything()[0].shape[0] == 4
        model(prompt[:, :1].repeat(4, 1), past_key_values=cache)


def test_an_argument_that_changes_attention_is_refused_by_name_at_once(models, prompt):
    model = models("llama")
    with (
        hillinfer.make_cache(model, "topk", alpha=0.2) as cache,
        pytest.raises(UsageError, match="position_bias"),
        torch.no_grad(),
    ):
        model(prompt, past_key_values=cache, position_bias=torch.zeros(1))
    model(prompt, position_bias=torch.zeros(1))  # without our cache it is transformers' own affair


def test_a_guess_that_fails_ends_looking_ahead_and_nothing_else(models, prompt, tmp_path, monkeypatch):
    model = models("llama")
    want = model.generate(prompt, max_new_tokens=8, do_sample=False)

    def fails(*args):
        raise RuntimeError("no such mask")

    monkeypatch.setattr(lookahead, "probe_query", fails)
    with hillinfer.make_cache(model, "hillinfer", alpha=1.0, drive=tmp_path, lookahead=True) as cache:
        with pytest.warns(UserWarning, match="looking ahead is off for this run: RuntimeError: no such mask"):
            got = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert torch.equal(got, want) and not cache.run.trial.on
        with warnings.catch_warnings(action="error"):
            model.generate(got, past_key_values=cache, max_new_tokens=4, do_sample=False)


MLA = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=9
)


def test_exact_families_run_exactly_and_refuse_a_selection(tmp_path):
    config = DeepseekV3Config(**TINY, **MLA, num_key_value_heads=4, max_position_embeddings=512)
    assert "MLA" in check_supported(config).exact
    assert plan(config, Settings(), 100, torch.float32) == 2 * 100 * (16 + 8) * 4  # of latents, not of heads
    torch.manual_seed(0)
    model = hillinfer_model(config)
    ids = torch.randint(2, 97, (2, 50))
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    for system, alpha in (("full", 0.2), ("flexgen", 0.2), ("dualblade", 0.2), ("hillinfer", 1.0)):
        drive = {} if system == "full" else {"drive": tmp_path}
        with hillinfer.make_cache(model, system, alpha=alpha, **drive) as cache:
            got = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
            assert torch.equal(got, want) and cache.counters.total("attended") > 0
    with pytest.raises(UsageError, match="expands in each step"):
        hillinfer.make_cache(model, "topk", alpha=0.2)
    with pytest.raises(UsageError, match="use full, flexgen or dualblade"):
        hillinfer.make_cache(config, "topk", alpha=0.2)


def hillinfer_model(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).eval()


def test_support_is_said_from_the_config_alone():
    assert check_supported(GPTNeoXConfig(**TINY)).tiered == [0, 1]  # is_decoder is False by default, and not looked at
    mixed = MistralConfig(**TINY, sliding_window=4096, max_position_embeddings=2048)  # longer than the context
    assert check_supported(mixed).tiered == [0, 1]
    assert check_supported(GemmaConfig(**TINY)).exact is None
    assert str(check_supported(LlamaConfig(**TINY))) == "2 of 2 layers are tiered"


@pytest.mark.parametrize(
    "config, why",
    [
        (T5Config(), "encoder-decoder"),
        (BertConfig(), "an encoder"),
        (MambaConfig(num_hidden_layers=2), "state of fixed size|cache class of its own"),
        (MistralConfig(**TINY, sliding_window=16), "sliding window only"),
    ],
)
def test_refusals_are_true(config, why):
    with pytest.raises(UsageError, match=why):
        check_supported(config)
