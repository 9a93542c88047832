"""KV heads that select for themselves: as a model of one KV head each would, and as one cache for everything else."""

import pytest
import torch
from transformers import LlamaConfig

import hillinfer
from hillinfer.systems.registry import POLICIES
from hillinfer.workbench.observe import AttentionRecord

HEADS, GROUP, DIM, N, SCALING = 3, 2, 16, 160, 0.25
APART = sorted(name for name, policy in POLICIES.items() if policy.per_head)
OPTIONS = dict(alpha=0.3, sinks=2, recent=4)


def config(kv_heads: int) -> LlamaConfig:
    heads = kv_heads * GROUP
    return LlamaConfig(
        hidden_size=heads * DIM, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1
    )


def steps(system: str, keys, values, queries, mask=None, **options):
    """Outputs (B, q, H, D) of a prefill and of decode steps after it, one for each query."""
    with hillinfer.make_cache(config(keys.shape[1]), system, **OPTIONS, **options) as cache, torch.no_grad():
        layer, before = cache.layers[0], keys.shape[2] - queries.shape[2]
        layer.update(keys[:, :, :before], values[:, :, :before])
        if layer.layer.policy.watches:
            layer.layer.observe(queries[:, :, :1].expand(-1, -1, before, -1), keys[:, :, :before], mask, SCALING)
        for at in range(before, keys.shape[2]):
            layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            seen = None if mask is None else torch.nn.functional.pad(mask, (0, at + 1 - before), value=True)
            yield layer.layer.attend(queries[:, :, at - before : at - before + 1], seen, SCALING)


def data(batch: int = 1):
    torch.manual_seed(0)
    return torch.randn(2, batch, HEADS, N, DIM), torch.randn(batch, HEADS * GROUP, 5, DIM)


@pytest.mark.parametrize("system", APART)
def test_each_head_selects_as_if_it_were_alone(system):
    (keys, values), queries = data(2)
    together = torch.cat(list(steps(system, keys, values, queries)), 1)
    for head in range(HEADS):
        one, own = slice(head, head + 1), slice(head * GROUP, (head + 1) * GROUP)
        alone = torch.cat(list(steps(system, keys[:, one], values[:, one], queries[:, own])), 1)
        torch.testing.assert_close(together[:, :, own], alone, rtol=1e-5, atol=1e-6)
    shared = torch.cat(list(steps(system, keys, values, queries, per_head=False)), 1)
    assert not torch.allclose(together, shared, atol=1e-3)


@pytest.mark.parametrize("system", ["oracle", "h2o", "snapkv"])  # no codes or boxes that padding would widen
def test_padding_is_hidden_from_every_head(system):
    (keys, values), queries = data(2)
    mask = torch.ones(2, 1, 1, N - 5, dtype=torch.bool)
    mask[0, ..., :30] = False
    both = torch.cat(list(steps(system, keys, values, queries, mask)), 1)
    keys[0, :, :30] += 3
    torch.testing.assert_close(torch.cat(list(steps(system, keys, values, queries, mask)), 1), both)


def test_beams_and_crop(models, prompt):
    model = models("llama")
    options = dict(num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=8)
    want = model.generate(prompt, **options)
    with hillinfer.make_cache(model, "topk", alpha=1.0) as cache:
        assert model.generate(prompt, past_key_values=cache, **options).tolist() == want.tolist()
        assert cache.run.heads == model.config.num_key_value_heads > 1
        assert cache.run.batch == 3 * len(prompt)
        cache.crop(10)
        assert cache.layers[0].layer.everything()[0].shape[:3] == (3 * len(prompt), cache.run.heads, 10)


def test_a_session_of_apart_heads_is_the_same_file_content(models, prompt, tmp_path):
    model, saved = models("llama"), []
    for per_head in (True, False):
        with hillinfer.make_cache(model, "topk", per_head=per_head) as cache, torch.no_grad():
            model(prompt[:1], past_key_values=cache)
            hillinfer.save_session(cache, tmp_path / str(per_head), model, prompt[0].tolist())
        opened, _ = hillinfer.open_session(tmp_path / str(per_head), model, "topk")
        with opened:
            saved.append(torch.stack(opened.layers[1].layer.everything()))
    assert torch.equal(*saved)


def test_an_observer_sees_all_heads(models, prompt):
    model = models("llama")
    with hillinfer.make_cache(model, "topk", alpha=0.3) as cache:
        cache.run.observer = record = AttentionRecord(exact=True)
        model.generate(prompt[:1], past_key_values=cache, max_new_tokens=4, do_sample=False)
    _, layers = record.snapshots_at()
    assert layers[0].mass.shape[0] == len(layers[0].recall) == model.config.num_attention_heads
    assert (layers[0].recall < 1).all()


def test_a_drive_keeps_heads_together(tmp_path):
    with pytest.raises(hillinfer.UsageError, match="leave out per_head"):
        hillinfer.Settings(per_head=True, drive=tmp_path)
