"""2-bit codes: their layout, their scores, and segments that come and go."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hillinfer
from hillinfer import native
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.evaluator.segments import BLOCK, SEGMENT, SegmentCodes, interleave, uninterleave


def drifting(n: int, dim: int = 16, batch: int = 1, kv_heads: int = 2) -> torch.Tensor:
    """Keys (batch, kv_heads, n, dim) that turn slowly, as rotary channels do, around a mean."""
    turn = torch.sin(torch.arange(n)[:, None] / torch.logspace(0.5, 4, dim))
    return torch.randn(batch, kv_heads, n, dim) * 0.5 + 3 * turn + torch.arange(dim)


def coded(*parts: torch.Tensor) -> SegmentCodes:
    batch, kv_heads, _, dim = parts[0].shape
    codes = SegmentCodes(batch, kv_heads, dim)
    for part in parts:
        codes.append(part)
    return codes


@pytest.mark.parametrize("dim", [2, 16, 30, 64])
def test_the_layout_is_reversible(dim):
    codes = torch.randint(0, 4, (2, 3, 2 * BLOCK, dim))
    stored = interleave(codes)
    assert stored.shape == (2, 3, 2 * BLOCK, -(-dim // 16) * 4) and stored.dtype == torch.int8
    assert torch.equal(uninterleave(stored)[..., :dim], codes.short())
    one = torch.zeros(BLOCK, 16, dtype=torch.uint8)
    one[3, 6] = 2  # of key 3: channel 6 is in the second plane of byte 2
    assert interleave(one).flatten().view(torch.uint8).nonzero().tolist() == [[4 * 3 + 2]]
    assert interleave(one).flatten()[14] == 2 << 2


@given(
    n=st.integers(1, 700), dim=st.sampled_from([4, 16, 30]), grow=st.sampled_from([1, 9]), seed=st.integers(0, 10**6)
)
@settings(max_examples=30, deadline=None)
def test_scores_are_those_of_int8_to_half_a_quarter_of_the_range(n, dim, grow, seed):
    """Also where later keys double the scale, so that old ranges halve."""
    torch.manual_seed(seed)
    first, last = drifting(n, dim), grow * drifting(3, dim)
    codes, exact = coded(first, last), KeyCodes(1, 2, dim)
    exact.append(first), exact.append(last)
    query, _ = codes.query(torch.randn(6, dim), 0)
    got, want = codes.scorer(query, 0)(None), exact.scorer(query, 0)(None)
    old = codes.codes.n
    assert old == (n + 2) // SEGMENT * SEGMENT and got.shape == want.shape and got.dtype == np.int32
    assert np.array_equal(got[:, old:], want[:, old:])
    if old:
        low, high = codes.ranges.view()[0].float().unbind(2)
        off = (high - low + 1) / 8 + (3 if grow > 1 else 0.5)  # halving rounds a range at both ends, and codes
        bound = torch.einsum("hgd,hsd->hgs", query.float().abs(), off) + dim * 64 * 1.5 + 1
        bound = bound.repeat_interleave(SEGMENT, 2).flatten(0, 1).numpy()
        assert (np.abs(got[:, :old] - want[:, :old]) <= bound).all()


def test_levels_follow_a_drift():
    """Quarters of a segment's range are closer to the keys than quarters of the whole range."""
    torch.manual_seed(0)
    keys = drifting(2049, 64)
    codes, exact, restored = coded(keys), KeyCodes(1, 2, 64), []
    exact.append(keys)
    want = exact.codes.view()[0, :, :2048].float()
    for n in range(2048, 0, -SEGMENT):
        codes.truncate(n)
        restored.insert(0, codes.newest.codes.view()[0].float())
    error, span = (torch.cat(restored, 1) - want).square().mean(), want.amax(1) - want.amin(1)
    assert error < 0.6 * (span / 4).square().mean() / 12  # of four levels over all tokens


def test_codes_do_not_depend_on_the_pieces():
    torch.manual_seed(0)
    keys = drifting(600, batch=2)
    keys[:, :, 5:7] = torch.tensor([-90.0, 90.0])[:, None]  # the widest are in the first piece
    one, many = coded(keys), coded(keys[:, :, :300], *keys[:, :, 300:].split(1, 2))
    for part in ("codes", "ranges"):
        assert torch.equal(getattr(one, part).view(), getattr(many, part).view())
    assert one.codes.n == 512 and torch.equal(one.newest.codes.view(), many.newest.codes.view())


def test_truncated_codes_go_on():
    torch.manual_seed(0)
    keys, query = drifting(600), torch.randn(4, 16)
    for n in (599, 513, 512, 300, 257, 256, 1):
        codes = coded(keys)
        quantised, _ = codes.query(query, 0)
        before, kept = codes.scorer(quantised, 0)(None), (n - 1) // SEGMENT * SEGMENT
        codes.truncate(n)
        assert (codes.codes.n, codes.newest.codes.n) == (kept, n - kept)
        after = codes.scorer(quantised, 0)(None)
        assert np.array_equal(after[:, :kept], before[:, :kept])
        assert np.corrcoef(after.ravel(), before[:, :n].ravel())[0, 1] > 0.999
        codes.append(keys[:, :, n:])
        assert codes.scorer(quantised, 0)(None).shape == before.shape and codes.codes.n == 512
    codes.truncate(0)
    codes.append(keys[:, :, :200])
    assert (codes.codes.n, codes.newest.codes.n) == (128, 72)


def test_rows_are_reordered():
    torch.manual_seed(0)
    keys, rows = drifting(300, batch=3), torch.tensor([2, 0])
    codes = coded(keys)
    quantised, _ = codes.query(torch.randn(4, 16), 2)
    want = codes.scorer(quantised, 2)(None)
    codes.reorder(rows)
    assert np.array_equal(codes.scorer(quantised, 0)(None), want)


def test_codes_take_less_than_7_percent_of_the_kv():
    keys = drifting(8192, 128)
    assert coded(keys).nbytes < 0.07 * 2 * 2 * keys.numel()  # K and V in 16 bits


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_the_kernel_is_not_needed(monkeypatch):
    torch.manual_seed(0)
    codes = coded(drifting(300))
    quantised, _ = codes.query(torch.randn(4, 16), 0)
    want = codes.scorer(quantised, 0)(None)
    monkeypatch.setattr(native, "available", lambda: False)
    assert np.array_equal(codes.scorer(quantised, 0)(None), want)


def test_a_drive_that_scores_refuses_2_bits(models, tmp_path):
    with pytest.raises(hillinfer.UsageError, match="int8 and int4"):
        hillinfer.make_cache(models("llama"), drive=tmp_path, drive_kind="emulated", precision="int2")
