"""Host and computational drive each score their pool: the tokens equal those of host-only scoring, paced or not."""

import pytest
import torch

import hillinfer
from benchmarks.faulty_drive import FaultyDrive

NEW = dict(max_new_tokens=24, do_sample=False, num_beams=1)


def generate(model, ids, tmp_path, **options):
    with hillinfer.make_cache(model, "hillinfer", alpha=0.1, recent=4, drive=tmp_path, **options) as cache:
        out = model.generate(ids, attention_mask=(ids != 0).long(), past_key_values=cache, **NEW)
        frame = cache.counters.frame()
        spans = cache.timeline.frame()
    assert not list(tmp_path.iterdir())
    return out, frame[["step", "layer", "device", "host", "drive", "swapped"]], spans


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "opt"])
@pytest.mark.parametrize("batch", [1, 2])
def test_same_tokens_and_pool_as_a_plain_drive(models, prompt, tmp_path, family, batch):
    model = models(family)
    ids = torch.cat((prompt, prompt.flip(1)))[:batch]
    ids[-1, : 40 * (batch - 1)] = 0
    want, counted, _ = generate(model, ids, tmp_path, lookahead=False)
    for options in (dict(lookahead=False), dict(lookahead=True), dict(lookahead=True, paced=True, precision="int8")):
        out, own, spans = generate(model, ids, tmp_path, drive_kind="emulated", **options)
        assert torch.equal(out, want) and own.equals(counted), options
        scored = spans[spans.kind == "evaluate"]
        assert len(scored) and (scored.lane == "drive").all() and (scored.bytes > 0).all()


def test_int4_too(models, prompt, tmp_path):
    model = models("llama")
    want = generate(model, prompt, tmp_path, precision="int4")[0]
    assert torch.equal(generate(model, prompt, tmp_path, precision="int4", drive_kind="emulated")[0], want)


def test_chunks_turns_and_crops(models, prompt, tmp_path):
    """Scales grow between chunks, so that the drive's older codes must follow; a crop takes tokens back."""
    model, out = models("qwen3"), {}
    for kind in ("ssd", "emulated"):
        with hillinfer.make_cache(model, "hillinfer", alpha=0.1, drive=tmp_path, drive_kind=kind) as cache:
            first = model.generate(prompt, past_key_values=cache, prefill_chunk_size=16, **NEW)
            cache.crop(-30)
            again = model.generate(prompt, past_key_values=cache, **NEW)
            turn = torch.cat((again, prompt[:, :20]), 1)
            out[kind] = first, again, model.generate(turn, past_key_values=cache, **NEW)
    assert all(torch.equal(a, b) for a, b in zip(*out.values(), strict=True))


def test_a_drive_that_fails_ends_generation_and_the_next_run_is_right(models, prompt, tmp_path):
    model = models("llama")
    with hillinfer.make_cache(model, "hillinfer", alpha=0.1, drive=tmp_path, drive_kind="emulated") as cache:
        want = model.generate(prompt, past_key_values=cache, **NEW)
        faulty = FaultyDrive("gone at a read")
        faulty.install(cache.run.drive._worker.file)
        with pytest.raises(hillinfer.DriveError, match=r"read failed at layer .*No such device"):
            model.generate(torch.cat((want, prompt[:, :1]), 1), past_key_values=cache, **NEW)
        cache.reset()
        assert torch.equal(model.generate(prompt, past_key_values=cache, **NEW), want)


@pytest.mark.parametrize("policy", ["full", "streaming", "random"])
def test_systems_that_score_nothing_run_on_it(models, prompt, tmp_path, policy):
    model, out = models("llama"), {}
    for kind in ("ssd", "emulated"):
        with hillinfer.make_cache(model, policy, alpha=0.3, drive=tmp_path, drive_kind=kind) as cache:
            out[kind] = model.generate(prompt, past_key_values=cache, **NEW)
    assert torch.equal(out["ssd"], out["emulated"])
