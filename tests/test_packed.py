"""INT4 records: their error, the share of reads in INT4, and their absence from the pool."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hillinfer
from hillinfer.systems.leoam.compression import Compression
from hillinfer.systems.leoam.packed import GROUP, PackedLog, pack, packed_geometry, unpack
from hillinfer.tiers.geometry import Geometry

NEW = dict(max_new_tokens=20, do_sample=False, num_beams=1)


@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_int4_record_is_within_half_a_step(dim, dtype):
    records = (torch.randn(50, 2, 3, dim) * torch.rand(50, 1, 1, 1) * 9).to(dtype)
    packed = pack(records)
    own = packed_geometry(Geometry(1, 3, dim, dtype, torch.device("cpu")))
    assert packed.shape[1:] == own.record_shape and packed.dtype == own.dtype
    error = (unpack(packed, dim, torch.float32) - records.float()).abs()
    for at in range(0, dim, GROUP):
        top = records[..., at : at + GROUP].float().abs().amax(-1, keepdim=True)
        assert (error[..., at : at + GROUP] <= top / 14 * 1.02 + 1e-6).all()


@given(
    st.integers(1, 5000),
    st.floats(1e-11, 1e-8),
    st.floats(0, 1e-5),
    st.floats(1e-6, 1e-1),
)
def test_the_share_is_the_least_that_hides_the_transfer(tokens, per_byte, per_token, compute):
    full, packed = 4096, 1152
    rule = Compression("auto", per_byte, per_token, compute)
    share = rule.share(tokens, full, packed)

    def transfer(share):
        return tokens * (((1 - share) * full + share * packed) * per_byte + share * per_token)

    assert 0 <= share <= 1
    if transfer(0) <= compute:
        assert share == 0  # off where transfer is not the longer side
    elif transfer(1) < transfer(0):
        assert transfer(share) == pytest.approx(max(compute, transfer(1)), rel=1e-6)
    else:
        assert share == 0  # unpacking would cost more than it saves


def test_nothing_is_packed_before_anything_was_measured():
    assert Compression("auto").share(100, 4096, 1152) == 0
    assert Compression(0.3).share(100, 4096, 1152) == 0.3


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_generation_with_a_share_in_int4(models, prompt, tmp_path, share, monkeypatch):
    model, reads, read = models("llama"), [], PackedLog.read

    def counted(log, positions, exact=True):
        out = read(log, positions, exact)
        if not exact:
            reads.append((int(log.coarse[positions].sum()), len(positions)))
        return out

    monkeypatch.setattr(PackedLog, "read", counted)
    options = dict(alpha=0.3, recent=4, drive=tmp_path, lookahead=False, compress=share)
    with hillinfer.make_cache(model, "leoam", **options) as cache:
        cache.run.pool_tokens = lambda n: 8
        out = model.generate(prompt, past_key_values=cache, **NEW)
        stores = [layer.layer.store for layer in cache.layers]
        assert sum(packed for packed, _ in reads) / sum(asked for _, asked in reads) == pytest.approx(share, abs=0.02)
        exact = stores[0].logs[0].read(np.arange(50))[0].tensor()
        coarse = stores[0].logs[0].packed.read(np.arange(50))[0].tensor()
        assert (unpack(coarse, exact.shape[-1], exact.dtype) - exact).abs().max() <= exact.abs().max() / 13
        for store in stores:  # what the pool holds is exact, whatever came in INT4
            held = store.pools[0].token_of
            slots = torch.from_numpy((held >= 0).nonzero()[0])
            order = torch.from_numpy(held[held >= 0]).argsort()
            want = store.logs[0].read(held[held >= 0][order.numpy()])[0].tensor()
            assert torch.equal(store.pools[0].records.view()[slots][order], want)
        everything, _ = stores[0].all()
        assert torch.equal(everything[0, :50], exact)  # a later turn prefills exactly
    assert out.shape[1] == prompt.shape[1] + 20 and not list(tmp_path.iterdir())
