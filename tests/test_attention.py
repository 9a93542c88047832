"""Attention merged from parts equals attention over all tokens at once."""

import pytest
import torch
import torch.nn.functional as F

from hillinfer.attention import merge, over_part, over_parts


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 20, 12], [36, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attention_at_once(sizes, dtype):
    torch.manual_seed(len(sizes))
    n, rows = sum(sizes), 6
    query, kv = torch.randn(2, 8, rows, 16).to(dtype), torch.randn(2, n, 2, 2, 16).to(dtype)
    visible = torch.ones(1, 1, rows, n, dtype=torch.bool).tril(n - rows).repeat(2, 1, 1, 1)
    visible[1, :, :, :9] = False  # left padding, whole parts of it hidden
    keys, values = kv.float().permute(2, 0, 3, 1, 4).repeat_interleave(4, 2)
    want = F.scaled_dot_product_attention(query.float(), keys, values, attn_mask=visible, scale=0.3)
    got = over_parts(query, kv.split(sizes, 1), visible, 0.3, n)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("sizes", [[50], [13] * 3 + [11], [48, 2], [20, 27, 3]])
def test_without_a_mask_the_newest_tokens_ask(sizes):
    query, kv = torch.randn(1, 6, 4, 8), torch.randn(1, 50, 2, 3, 8)
    causal = torch.ones(1, 1, 4, 50, dtype=torch.bool).tril(46)
    got, want = (over_parts(query, kv.split(sizes, 1), mask, 0.5, 50) for mask in (None, causal))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [8, 36, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_equals_its_definition(dim, dtype):
    torch.manual_seed(dim)
    query, kv = torch.randn(2, 8, 5, dim).to(dtype), torch.randn(2, 137, 2, 2, dim).to(dtype)
    shown = torch.rand(2, 1, 5, 137) > 0.5
    shown[1], shown[0, :, 0] = False, False  # left padding over the whole part; a query that sees nothing of it
    streamed = kv.permute(2, 1, 0, 3, 4).contiguous().permute(2, 1, 0, 3, 4)  # keys apart from values
    for mask, laid in ((None, kv), (None, streamed), (shown, kv)):
        want, lse = over_part(query, kv, mask, 0.3, flash=False)
        got, mine = over_part(query, laid, mask, 0.3)
        torch.testing.assert_close(got, want, atol=2e-5 if dtype == torch.float32 else 2e-2, rtol=0)
        torch.testing.assert_close(mine, lse, atol=1e-4, rtol=1e-3)


def test_a_row_that_sees_nothing_is_finite():
    kv = torch.randn(1, 4, 2, 1, 8)
    got = over_parts(torch.randn(1, 1, 1, 8), [kv], torch.zeros(1, 1, 1, 4, dtype=torch.bool), 1.0, 4)
    assert got.isfinite().all()


def test_parts_without_tokens_merge_to_zeros():
    empty = torch.zeros(1, 2, 8), torch.full((1, 2), -torch.inf)
    other = torch.randn(1, 2, 8), torch.randn(1, 2)
    assert torch.equal(merge([empty, empty])[0], torch.zeros(1, 2, 8))
    assert all(torch.equal(*pair) for pair in zip(merge([empty, other]), other, strict=True))
