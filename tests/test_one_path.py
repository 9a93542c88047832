"""One code path: with kernels or without, on either engine, `generate` selects the same tokens and says the same."""

import numpy as np
import pytest
import torch

import hillinfer
from hillinfer import attention, native
from hillinfer.evaluator.policies.topk import TopK
from hillinfer.native import ring

NEW = dict(max_new_tokens=24, do_sample=False, num_beams=1)
needs_kernels = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


@pytest.fixture
def run(models, prompt, monkeypatch):
    """generate's tokens, and every selection that was made on the way."""

    def go(family: str, system: str, batch: int = 1, **options):
        model, picks, real = models(family), [], TopK.select

        def select(self, step):
            picks.append(real(self, step))
            return picks[-1]

        ids = torch.cat((prompt, prompt.flip(1)))[:batch].clone()
        ids[-1, : 40 * (batch - 1)] = 0  # left padding
        with monkeypatch.context() as patch, hillinfer.make_cache(model, system, alpha=0.1, **options) as cache:
            patch.setattr(TopK, "select", select)
            out = model.generate(ids, attention_mask=(ids != 0).long(), past_key_values=cache, **NEW)
        return out, picks

    return go


def same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("precision", ["int8", "int4", "int2"])
@pytest.mark.parametrize("drive", [False, True])
def test_kernels_select_the_same_tokens(run, monkeypatch, tmp_path, family, precision, drive):
    options = dict(precision=precision, batch=2)
    options |= dict(drive=tmp_path, lookahead=False) if drive else {}
    system = "hillinfer" if drive else "topk"
    fast = run(family, system, **options)
    heads = 1 if drive else {"opt": 4}.get(family, 2)  # KV heads that select apart
    assert len(fast[1]) == 2 * heads * 3 * 23  # sequences, layers, decode steps
    monkeypatch.setattr(attention, "is_native", lambda query: False)
    mixed = run(family, system, **options)
    monkeypatch.setattr(native, "available", lambda: False)
    plain = run(family, system, **options)
    assert same(mixed, plain)  # integers: to the bit, whatever the machine
    assert same(fast, plain)  # attention's sums differ in the last places; here they change no choice


@pytest.mark.skipif(bool(ring.why_not()), reason=str(ring.why_not()))
@pytest.mark.parametrize("lookahead", [False, True])
def test_both_engines_say_the_same(run, tmp_path, lookahead):
    options = dict(drive=tmp_path, lookahead=lookahead)
    one, other = (run("llama", "hillinfer", engine=engine, **options) for engine in ("io_uring", "threads"))
    assert torch.equal(one[0], other[0]) and (lookahead or same(one, other))
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_not_there_is_refused_at_once(models, tmp_path, monkeypatch):
    monkeypatch.setattr(ring, "why_not", lambda: "no io_uring here (Function not implemented): choose engine threads")
    with pytest.raises(hillinfer.UsageError, match="choose engine threads"):
        hillinfer.make_cache(models("llama").config, "hillinfer", drive=tmp_path, engine="io_uring")
    with pytest.raises(hillinfer.UsageError, match="no engine 'aio'"):
        hillinfer.make_cache(models("llama").config, "hillinfer", drive=tmp_path, engine="aio")
