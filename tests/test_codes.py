"""Integer scores are exact, on random and extreme codes, and top-k is what its definition says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer.evaluator.codes import EXACT_FP32_DIM, TOP, KeyCodes, group_scores, group_scores_reference
from hillinfer.evaluator.topk import merge_heads, topk


@given(
    heads=st.integers(1, 4), group=st.integers(1, 8), dim=st.sampled_from([1, 16, 64, 128, 256, EXACT_FP32_DIM]),
    n=st.integers(1, 300), extreme=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_scores_equal_the_numpy_reference(heads, group, dim, n, extreme, seed):
    rng = np.random.default_rng(seed)
    values = np.array([-TOP, TOP]) if extreme else np.arange(-TOP, TOP + 1)
    query, codes = (rng.choice(values, shape).astype(np.int8) for shape in ((heads, group, dim), (heads, n, dim)))
    got = group_scores(torch.from_numpy(query), torch.from_numpy(codes), block=128)
    assert got.dtype == np.int32
    assert np.array_equal(got, group_scores_reference(query, codes))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_scores_are_exact(sign):
    query = np.full((1, 1, EXACT_FP32_DIM), TOP, np.int8)
    got = group_scores(torch.from_numpy(query), torch.from_numpy(sign * query))
    assert got.item() == sign * TOP * TOP * EXACT_FP32_DIM


def test_a_head_dim_beyond_exactness_is_refused():
    with pytest.raises(ValueError, match="exact"):
        KeyCodes(1, 1, EXACT_FP32_DIM + 1)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), grow=st.floats(0.01, 100), seed=st.integers(0, 10**6)
)
@settings(max_examples=40, deadline=None)
def test_codes_built_in_parts_stay_close_to_the_keys(sizes, grow, seed):
    """Later keys may be larger than all before: codes never saturate, and lie within one step of the true key."""
    torch.manual_seed(seed)
    parts = [torch.randn(2, 3, n, 8) * grow**i for i, n in enumerate(sizes)]
    codes = KeyCodes(2, 3, 8)
    for part in parts:
        codes.append(part)
    keys = torch.cat(parts, 2)
    back = codes.codes.view().float() * codes.scale
    assert codes.codes.n == keys.shape[2]
    assert ((back - keys).abs() <= codes.scale * 1.01).all()
    assert (codes.scale * TOP <= keys.abs().amax(2, keepdim=True) * 2.01).all()  # no channel wastes more than a bit


def test_one_append_is_the_plain_quantisation():
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 50, 16)
    codes = KeyCodes(1, 2, 16)
    codes.append(keys)
    scale = keys.abs().amax(2, keepdim=True) / TOP
    assert torch.equal(codes.codes.view(), (keys / scale).round().to(torch.int8))


def test_scores_rank_as_the_true_dot_products_do():
    torch.manual_seed(0)
    keys, query = torch.randn(1, 2, 500, 64), torch.randn(4, 64)
    codes = KeyCodes(1, 2, 64)
    codes.append(keys)
    got = codes.scores(codes.query(query, 0), 0)
    want = torch.einsum("hgd,hnd->hgn", query.view(2, 2, 64), keys[0]).amax(1)
    for head in range(2):
        best = set(topk(got[head], 50)) & set(want[head].topk(50).indices.tolist())
        assert len(best) >= 47


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=200), st.integers(0, 220))
def test_topk_breaks_ties_to_the_lowest_position(values, k):
    scores = np.array(values, np.int32)
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert topk(scores, k).tolist() == want


def test_topk_of_the_widest_scores():
    low, high = np.iinfo(np.int32).min + 1, np.iinfo(np.int32).max
    assert topk(np.array([low, high, low, high], np.int32), 3).tolist() == [1, 3, 0]


@given(heads=st.integers(1, 5), n=st.integers(1, 80), k=st.integers(0, 90), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_merged_heads_are_the_best_ranks(heads, n, k, seed):
    scores = np.random.default_rng(seed).integers(-9, 9, (heads, n)).astype(np.int32)
    got = merge_heads(scores, k)
    assert len(got) == min(k, n) and (np.diff(got) > 0).all()
    ranks = np.stack([np.argsort(topk(head, n)) for head in scores]).min(0)  # position -> its best rank in any head
    outside = np.setdiff1d(np.arange(n), got)
    if len(got) and len(outside):
        assert ranks[got].max() <= ranks[outside].min()
