"""Lookahead by one layer does not change the output, and leaves neither hooks nor threads behind."""

import gc
import threading

import pytest
import torch

import hillinfer
from benchmarks.faulty_drive import FaultyDrive
from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.models.lookahead import probe_query
from hillinfer.pipeline.lookahead import AHEAD, TRIAL_STEPS, Trial
from tests.conftest import FAMILIES

NEW = dict(max_new_tokens=24, do_sample=False, num_beams=1)


@pytest.fixture(params=[name for name in FAMILIES if name != "mistral-sliding"])
def model(request, models):
    model = models(request.param)
    yield model


def hooks(model) -> int:
    return sum(len(block._forward_pre_hooks) for block in model.get_decoder().layers)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("hillinfer")}


@pytest.mark.parametrize("batch", [1, 2])
def test_same_tokens_with_and_without(model, prompt, tmp_path, batch):
    ids = torch.cat((prompt, prompt.flip(1)))[:batch]
    ids[-1, : 40 * (batch - 1)] = 0
    out, counted = {}, {}
    for lookahead in (True, False):
        options = dict(alpha=0.1, recent=4, drive=tmp_path, lookahead=lookahead)
        with hillinfer.make_cache(model, "hillinfer", **options) as cache:
            out[lookahead] = model.generate(ids, attention_mask=(ids != 0).long(), past_key_values=cache, **NEW)
            frame = cache.counters.frame()
            counted[lookahead] = frame[["step", "layer", "device", "host", "drive", "swapped"]]
            assert (frame.prefetched.sum() > 0) == lookahead
            assert (frame.prefetched <= frame[["guessed", "drive"]].min(axis=1)).all()
    assert torch.equal(out[True], out[False])
    assert counted[True].equals(counted[False])  # the pool, too, goes the same way


def test_a_probe_of_a_layers_own_input_is_its_query_to_the_bit(model, prompt):
    block, inputs, seen = model.get_decoder().layers[1], [], []
    own = block.register_forward_pre_hook(lambda m, a, k: inputs.append((a, k)), with_kwargs=True)

    class Watch(hillinfer.Policy):
        needs_codes = False

        def select(self, step):
            return None

    cache = hillinfer.TieredCache(model.config, Watch)
    layer = cache.layers[1].layer
    attend = layer.attend
    layer.attend = lambda query, mask, scaling, *more: seen.append(query) or attend(query, mask, scaling)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
        model(prompt[:, -1:], past_key_values=cache)
        own.remove()
        probed = probe_query(block, *inputs[-1]).args[0]
    assert torch.equal(probed, seen[0])


def test_hooks_and_threads_go_with_the_cache(models, prompt, tmp_path):
    model = models("llama")
    for end in ("close", "with", "forgotten", "error"):
        cache = hillinfer.make_cache(model, "hillinfer", drive=tmp_path, lookahead=True)
        assert hooks(model) == 2
        model.generate(prompt, past_key_values=cache, **NEW)
        assert threads()
        if end == "close":
            cache.close()
        elif end == "with":
            with cache:
                pass
        elif end == "error":
            with pytest.raises(ZeroDivisionError), cache:
                raise ZeroDivisionError
        del cache
        gc.collect()
        assert hooks(model) == 0 and not threads(), end


def test_a_cache_of_another_model_or_run_is_left_alone(models, prompt, tmp_path):
    """The hooks of one cache must not guess while another, or none, is in use."""
    model = models("llama")
    with hillinfer.make_cache(model, "hillinfer", drive=tmp_path, lookahead=True) as first:
        want = model.generate(prompt, past_key_values=first, **NEW)
        before = len(first.timeline.spans)
        with hillinfer.make_cache(model, "topk", alpha=1.0) as second:
            model.generate(prompt, past_key_values=second, **NEW)
        model.generate(prompt, **NEW)
        assert len(first.timeline.spans) == before
        first.reset()
        assert torch.equal(model.generate(prompt, past_key_values=first, **NEW), want)


@pytest.mark.parametrize("at", [0, 5])
def test_an_error_of_the_prefetch_ends_generation_with_its_place(models, prompt, tmp_path, at):
    model = models("llama")
    with hillinfer.make_cache(model, "hillinfer", alpha=0.1, recent=4, drive=tmp_path, lookahead=True) as cache:
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        faulty = FaultyDrive("gone at a read", at)
        faulty.install(cache.run.drive)
        with pytest.raises(hillinfer.DriveError, match=r"layer \d, sequence 0, position \d+"):
            model.generate(torch.cat((prompt, prompt[:, :1]), 1), past_key_values=cache, **NEW)
        assert faulty.counts[3] == 1
        cache.reset()
        model.generate(prompt, past_key_values=cache, **NEW)  # model and cache are usable again
    assert not threads() and not list(tmp_path.iterdir())


def test_a_hook_that_another_thread_is_removing_does_nothing(model, prompt, tmp_path):
    """Of a hook on its way out torch may forget that it wants keyword arguments before it forgets the hook."""
    with hillinfer.make_cache(model, "hillinfer", alpha=0.3, drive=tmp_path, lookahead=True) as cache:
        for block in model.get_decoder().layers:
            block._forward_pre_hooks_with_kwargs.clear()
        model.generate(prompt, past_key_values=cache, **NEW)
        assert not cache.counters.total("guessed")


@pytest.mark.parametrize("faster", [True, False])
def test_auto_keeps_the_faster_way(faster):
    trial, now = Trial("auto"), 0.0
    for _ in range(2 * TRIAL_STEPS + 1):
        trial.step(now)
        now += 1.0 if trial.on == faster else 2.0
    assert trial.times is None and trial.on == faster
    trial.step(now + 99)
    assert trial.on == faster


@pytest.mark.parametrize("fastest", AHEAD)
def test_auto_keeps_the_fastest_share(fastest):
    trial, now, tried = Trial("auto", AHEAD), 0.0, []
    for _ in range(len(AHEAD) * TRIAL_STEPS + 1):
        trial.step(now)
        tried.append(trial.on)
        now += 1.0 if trial.on == fastest else 2.0
    assert trial.times is None and trial.on == fastest
    assert list(dict.fromkeys(tried)) == list(AHEAD)


def test_a_share_of_a_guess_reads_less_and_changes_no_token(model, prompt, tmp_path):
    out, guessed = {}, {}
    for share in (True, 0.5, False):
        with hillinfer.make_cache(model, "hillinfer", alpha=0.3, recent=4, drive=tmp_path, lookahead=share) as cache:
            out[share] = model.generate(prompt, past_key_values=cache, **NEW).tolist()
            guessed[share] = cache.counters.total("guessed")
    assert out[True] == out[0.5] == out[False]
    assert guessed[True] > guessed[0.5] > guessed[False] == 0


@pytest.mark.parametrize("share", ["yes", -0.1, 1.5])
def test_a_bad_share_is_refused(share):
    with pytest.raises(UsageError, match="lookahead"):
        Settings(lookahead=share)


def test_a_pause_is_no_step():
    trial = Trial("auto")
    trial.step(0)
    trial.pause()
    trial.step(1000)
    trial.step(1001)
    assert trial.times[True] == [1]
    assert Trial(True).on and not Trial(False).on
