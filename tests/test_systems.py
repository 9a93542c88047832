"""Every system of the registry, whoever added it, goes through the same matrix."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import hillinfer
from benchmarks.faults import resources

NEW = dict(max_new_tokens=12, do_sample=False, num_beams=1)
PLACES = ("memory", "ssd", "emulated")


def options_for(name: str, place: str, folder: Path, **options) -> dict:
    """Settings for that place; skips where the system says, with a clear error, that it has no use for it."""
    options |= {} if place == "memory" else dict(drive=folder, drive_kind=place)
    try:
        hillinfer.systems.registry.find_system(name, options)
    except hillinfer.UsageError as error:
        pytest.skip(str(error))
    return options


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


@pytest.fixture(params=list(hillinfer.list_systems()))
def system(request):
    return request.param


@pytest.fixture(params=["llama", "opt"])
def model(request, models):
    return models(request.param)


def padded(prompt):
    ids = torch.cat((prompt, prompt.flip(1)))
    ids[1, :60] = 0
    return ids, (ids != 0).long()


def test_full_budget_equals_full(model, prompt, system, place, tmp_path):
    """Greedy tokens of a padded batch and of a second turn are those of DynamicCache."""
    options = options_for(system, place, tmp_path, alpha=1.0)
    ids, mask = padded(prompt)
    kept = DynamicCache(config=model.config)
    first = model.generate(ids, attention_mask=mask, past_key_values=kept, **NEW)
    turn, longer = torch.cat((first, ids[:, -20:]), 1), torch.cat((mask, mask.new_ones((2, 32))), 1)
    second = model.generate(turn, attention_mask=longer, past_key_values=kept, **NEW)
    with hillinfer.make_cache(model, system, **options) as cache:
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **NEW), first)
        assert torch.equal(model.generate(turn, attention_mask=longer, past_key_values=cache, **NEW), second)
    assert not list(tmp_path.iterdir())


def test_a_tenth_runs_within_its_budget(model, prompt, system, place, tmp_path):
    """A padded batch, chunked prefill, a crop and a second turn; where it selects, never more than its budget."""
    options = options_for(system, place, tmp_path, alpha=0.1, recent=8)
    ids, mask = padded(prompt)
    with hillinfer.make_cache(model, system, **options) as cache:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=64, **NEW)
        assert out.shape == (2, ids.shape[1] + 12)
        cache.crop(-5)
        longer = torch.cat((mask, mask.new_ones((2, 12))), 1)
        model.generate(out, attention_mask=longer, past_key_values=cache, **NEW)
        rows, memory = cache.counters.rows, cache.memory()
    assert rows and all(row.device + row.host + row.drive == row.queries for row in rows)
    if not hillinfer.list_systems()[system].policy.exact and system != "quest-dense":
        assert all(row.attended <= 2 * cache.run.heads * cache.run.settings.budget(row.cached) for row in rows)
    assert sum(memory.values()) > 0


class Interrupt(LogitsProcessor):
    """Ctrl-C at the sixth token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 6:
            raise KeyboardInterrupt
        return scores


def test_interruption_leaves_nothing(models, prompt, system, place, tmp_path):
    options = options_for(system, place, tmp_path, alpha=0.2)
    model, before = models("llama"), resources()
    with pytest.raises(KeyboardInterrupt), hillinfer.make_cache(model, system, **options) as cache:
        model.generate(prompt, past_key_values=cache, logits_processor=LogitsProcessorList([Interrupt()]), **NEW)
    after = resources()
    assert not list(tmp_path.iterdir()) and after[:2] == before[:2]
    assert after[2] <= before[2]  # descriptors; an earlier test's may have been closed since
    assert not any(block._forward_pre_hooks for block in model.get_decoder().layers)


@pytest.mark.parametrize("system", [n for n, s in hillinfer.list_systems().items() if s.policy.can_speculate])
def test_lookahead_changes_no_token(models, prompt, system, tmp_path):
    """A guess is only a prefetch, also for policies that learn from their selections."""
    model, out = models("llama"), {}
    ids, mask = padded(prompt)
    for lookahead in (True, False):
        options = options_for(system, "ssd", tmp_path, alpha=0.15, recent=4, lookahead=lookahead, compress=0.0)
        with hillinfer.make_cache(model, system, **options) as cache:
            out[lookahead] = model.generate(ids, attention_mask=mask, past_key_values=cache, **NEW)
            assert (cache.counters.total("guessed") > 0) == lookahead
    assert torch.equal(out[True], out[False])


class Tuned(torch.nn.Module):
    """A wrapper with the model two levels down, as peft's."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel, Tuned])
def test_the_model_within_a_wrapper_is_used(models, wrap, tmp_path):
    with hillinfer.make_cache(wrap(models("llama")), "hillinfer", drive=tmp_path) as cache:
        assert len(cache.tiered) == 3 and cache.hooks


@pytest.mark.parametrize("other", ["Qwen/Qwen3-0.6B", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(other):
    with pytest.raises(hillinfer.UsageError, match="is no transformers model: load one"):
        hillinfer.make_cache(other, "topk")
