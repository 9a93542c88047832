"""Integer scores are exact on random and extreme codes, and top-k follows its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer.evaluator.codes import (
    EXACT_FP32_DIM,
    TOP,
    KeyCodes,
    head_scores,
    head_scores_reference,
    pack,
    products,
    unpack,
)
from hillinfer.evaluator.ranks import STEPS, head_ranks
from hillinfer.evaluator.topk import highest, topk, topk_reference
from hillinfer.layer import NEVER


@given(
    bits=st.sampled_from([8, 4]),
    heads=st.integers(1, 4),
    group=st.integers(1, 8),
    dim=st.sampled_from([2, 16, 64, 128, 256, EXACT_FP32_DIM]),
    n=st.integers(1, 300),
    extreme=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_scores_equal_the_numpy_reference(bits, heads, group, dim, n, extreme, seed):
    rng = np.random.default_rng(seed)

    def draw(top, *shape):
        values = np.array([-top, top]) if extreme else np.arange(-top, top + 1)
        return rng.choice(values, shape).astype(np.int8)

    query, codes = draw(TOP[8], heads, group, dim), draw(TOP[bits], heads, n, dim)
    stored = pack(torch.from_numpy(codes), bits)
    assert stored.shape[2] == dim * bits // 8 and np.array_equal(unpack(stored, bits).numpy(), codes)
    want = head_scores_reference(query, codes)
    got = products(torch.from_numpy(query), unpack(stored, bits)).flatten(0, 1)
    assert got.dtype == torch.float32 and np.array_equal(got, want)
    assert np.array_equal(head_scores(torch.from_numpy(query), stored, bits), want)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_scores_are_exact(sign):
    query = np.full((1, 1, EXACT_FP32_DIM), TOP[8], np.int8)
    for scores in (products, head_scores):
        got = scores(torch.from_numpy(query), torch.from_numpy(sign * query))
        assert got.item() == sign * TOP[8] ** 2 * EXACT_FP32_DIM


def test_a_head_dim_beyond_exactness_is_refused():
    with pytest.raises(ValueError, match="exact"):
        KeyCodes(1, 1, EXACT_FP32_DIM + 1)


@given(
    bits=st.sampled_from([8, 4]),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    grow=st.floats(0.01, 100),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_codes_built_in_parts_stay_close_to_the_keys(bits, sizes, grow, seed):
    """Later keys may be larger than all before: codes never saturate, and lie within one step of the true key."""
    torch.manual_seed(seed)
    parts = [torch.randn(2, 3, n, 8) * grow**i for i, n in enumerate(sizes)]
    codes = KeyCodes(2, 3, 8, bits)
    for part in parts:
        codes.append(part)
    keys = torch.cat(parts, 2)
    back = unpack(codes.codes.view(), bits).float() * codes.scale + codes.zero
    assert codes.codes.n == keys.shape[2]
    assert ((back - keys).abs() <= codes.scale * 1.01).all()
    assert (
        codes.scale * TOP[bits] <= (keys - codes.zero).abs().amax(2, keepdim=True) * 2.01
    ).all()  # no channel wastes more than a bit


def test_one_append_is_the_plain_quantisation():
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 50, 16)
    codes = KeyCodes(1, 2, 16)
    codes.append(keys)
    zero = (keys.amin(2, keepdim=True) + keys.amax(2, keepdim=True)) / 2
    scale = (keys - zero).abs().amax(2, keepdim=True) / TOP[8]
    assert torch.equal(codes.codes.view(), ((keys - zero) / scale).round().to(torch.int8))
    assert codes.codes.view().amin() == -TOP[8] and codes.codes.view().amax() == TOP[8]


def test_an_offset_of_all_keys_changes_no_code():
    """Keys of real models have channels with large means (a bias, a slow rotary frequency)."""
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 50, 16).mul(64).round()  # whole numbers: exact in fp32 with the offset
    plain, offset = (KeyCodes(1, 2, 16, 4) for _ in range(2))
    plain.append(keys), offset.append(keys + torch.arange(16) * 512)
    assert torch.equal(plain.codes.view(), offset.codes.view())


@pytest.mark.parametrize(("bits", "least"), [(8, 47), (4, 38)])
def test_scores_rank_as_the_true_dot_products_do(bits, least):
    torch.manual_seed(0)
    keys, query = torch.randn(1, 2, 500, 64), torch.randn(4, 64)
    codes = KeyCodes(1, 2, 64, bits)
    codes.append(keys)
    coded, unit = codes.query(query, 0)
    got = codes.scorer(coded, 0)(None)
    want = torch.einsum("hgd,hnd->hgn", query.view(2, 2, 64), keys[0]).flatten(0, 1)
    errors = torch.from_numpy(got * unit.repeat(2)[:, None]) - want
    errors -= errors.mean(1, keepdim=True)  # a zero point shifts all scores of a head
    assert errors.std() < (0.1 if bits == 8 else 1.5)  # of dot products with a standard deviation of 8
    for head in range(4):
        assert len(set(topk(got[head], 50)) & set(want[head].topk(50).indices.tolist())) >= least


def test_odd_head_dims_have_no_int4():
    with pytest.raises(ValueError, match="int8"):
        KeyCodes(1, 1, 7, 4)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=200), st.integers(0, 220))
def test_topk_breaks_ties_to_the_lowest_position(values, k):
    scores = np.array(values, np.int32)
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert topk(scores, k).tolist() == want


def test_topk_of_the_widest_scores():
    low, high = np.iinfo(np.int32).min + 1, np.iinfo(np.int32).max
    assert topk(np.array([low, high, low, high], np.int32), 3).tolist() == [1, 3, 0]


@pytest.mark.parametrize("n", [2047, 4096, 9001])
@pytest.mark.parametrize("kind", ["spread", "skewed", "ties", "equal", "periodic", "sorted", "few"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.9, 1])
def test_topk_of_many_is_the_reference(n, kind, share):
    """Where a sample of the scores guesses the floor: also where that guess is far off."""
    random, i = np.random.default_rng(n), np.arange(n)
    scores = {
        "spread": random.integers(-(2**31) + 1, 2**31, n),
        "skewed": random.standard_normal(n) ** 9 * 1e3,
        "ties": random.integers(-3, 3, n),
        "equal": i * 0,
        "periodic": (i % 2 == 0) * 1000 + random.integers(0, 9, n),  # a sample sees one kind alone
        "sorted": i,
        "few": (i % 97 == 1) * 10**6 + random.integers(0, 9, n),
    }[kind].clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)  # fmt: skip
    k = max(1, int(share * n))
    assert (topk(scores, k) == topk_reference(torch.from_numpy(scores), k).numpy()).all()


@given(
    heads=st.integers(1, 9),
    n=st.integers(1, 400),
    spread=st.sampled_from([1, 100, 10**4, 2**22]),
    scale=st.floats(1e-6, 30),
    hidden=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_ranks_are_log_probabilities(heads, n, spread, scale, hidden, seed):
    """To a tenth of a factor of two at most, as long as a token matters to some head."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-spread, spread + 1, (heads, n)).astype(np.int32)
    unit = (scale / spread * (0.5 + rng.random(heads))).astype(np.float32)
    if hidden and n > 1:
        scores[:, :: n - 1] = NEVER
        scores[:, 0] = 0
    logits = scores.astype(float) * unit[:, None]
    best = (logits - np.logaddexp.reduce(logits, 1)[:, None]).max(0) / np.log(2)
    got = head_ranks(scores, unit) / STEPS
    near = best > -1000
    np.testing.assert_allclose(got[near], best[near], atol=0.09, rtol=1e-5)


def test_ranks_do_not_depend_on_the_scale_of_a_head():
    """A flat head with large scores has no more say than a sharp one with small ones: unlike the raw maximum."""
    flat, sharp = np.full(100, 5000, np.int32), np.zeros(100, np.int32)
    flat[::2] += 1
    sharp[7] = 12
    order = topk(head_ranks(np.stack((flat, sharp)), np.array([1, 1], np.float32)), 100)
    assert order[0] == 7 and (flat[order[1:50]] == 5001).all()


@given(
    bits=st.sampled_from([8, 4]),
    heads=st.integers(1, 4),
    group=st.integers(1, 4),
    n=st.sampled_from([3, 40, 300, 5000]),
    few=st.sampled_from([0, 1, 9, 10**4]),
    hidden=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=30, deadline=None)
def test_ranks_of_a_batch_in_tensors_are_those_of_each_row(bits, heads, group, n, few, hidden, seed):
    """What a GPU computes, here on the CPU, against kernels: to the bit, with ties, padding and scales that double."""
    rng = np.random.default_rng(seed)
    keys = torch.from_numpy(rng.integers(-few, few + 1, (2, heads, n, 16))).float()
    keys[:, :, -1] *= 9
    query = torch.from_numpy(rng.integers(-few, few + 1, (2, heads * group, 16))).float()
    one, other = KeyCodes(2, heads, 16, bits), KeyCodes(2, heads, 16, bits)
    for piece in keys.split((n - 1, 1), 2):
        one.append(piece), other.append_reference(piece)
    valid = torch.arange(n) >= torch.tensor([[0], [n // 2 * hidden]])
    got = other.ranks(query, 0.1, valid)
    chosen = highest(got, n // 3)
    for row in range(2):
        coded, unit = one.query(query[row], row)
        scores = one.scorer(coded, row)(None)
        scores[:, ~valid[row].numpy()] = NEVER
        want = head_ranks(scores, np.repeat(unit * np.float32(0.1), group))
        assert np.array_equal(got[row], want)
        assert np.array_equal(chosen[row], topk(want, n // 3))
        assert np.array_equal(chosen[row], topk_reference(got[row], n // 3))
