"""Copies of a cache: independent ones in memory, a clear refusal elsewhere."""

import copy
import io

import pytest
import torch

import hillinfer
from hillinfer import UsageError

IN_MEMORY = [name for name, system in hillinfer.list_systems().items() if not system.needs_drive]


def answer(model, cache, ids: torch.Tensor) -> torch.Tensor:
    rules = dict(max_new_tokens=6, do_sample=False, num_beams=1)
    return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **rules)


@pytest.mark.parametrize("system", IN_MEMORY)
@pytest.mark.parametrize("family", ["llama", "qwen2-mixed"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_in_memory_answer_as_the_original_and_change_nothing_of_it(models, prompt, family, system, mode):
    model, other = models(family), torch.tensor([[5, 6, 7]])
    asked, unlike = (torch.cat((prompt, more), 1) for more in (other, other.flip(1)))
    with hillinfer.make_cache(model, system, alpha=0.3) as cache:
        with mode():
            model(prompt, past_key_values=cache)
            copies = [copy.deepcopy(cache) for _ in range(3)]
        got = [answer(model, copies[0], asked), answer(model, copies[1], unlike), answer(model, copies[2], asked)]
        copies[0].close()
        assert cache.get_seq_length() == prompt.shape[1]
        want = answer(model, cache, asked)
    assert torch.equal(got[0], want) and torch.equal(got[2], want)
    with hillinfer.make_cache(model, system, alpha=0.3) as fresh, torch.no_grad():
        model(prompt, past_key_values=fresh)
        assert torch.equal(got[1], answer(model, fresh, unlike))


def test_a_copy_on_a_drive_is_refused_with_its_fix(models, prompt, tmp_path):
    with hillinfer.make_cache(models("llama"), "hillinfer", drive=tmp_path) as cache, torch.no_grad():
        models("llama")(prompt, past_key_values=cache)
        with pytest.raises(UsageError, match="open_session for each copy"):
            copy.deepcopy(cache)


@pytest.mark.parametrize("write", [copy.copy, lambda cache: torch.save(cache, io.BytesIO())], ids=["copy", "save"])
def test_a_cache_is_not_pickled(models, write):
    with hillinfer.make_cache(models("llama"), "topk") as cache, pytest.raises(UsageError, match="save_session"):
        write(cache)
