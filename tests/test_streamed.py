"""The systems that stream whole tensors are lossless, whatever path and pipeline; nothing of them stays behind."""

import errno
import gc
import os
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import hillinfer
from hillinfer.native import ring
from hillinfer.systems.lossless.plan import DIRECT, NEAR
from hillinfer.systems.lossless.store import TensorStore
from hillinfer.systems.lossless.tensors import HostPath, Tensors
from hillinfer.tiers.block_file import BLOCK, BlockFile
from hillinfer.tiers.geometry import Geometry
from tests.conftest import FAMILIES

NEW = 40
WAYS = {
    "flexgen": dict(system="flexgen"),
    "flexgen, some resident": dict(system="flexgen", host_budget=130_000),
    "flexgen, all resident": dict(system="flexgen", host_budget="1GB", max_tokens=600),
    "flexgen, no prefetch": dict(system="flexgen", lookahead=False),
    "dualblade": dict(system="dualblade"),
    "dualblade, half": dict(system="dualblade", host_budget=130_000),
    "dualblade, cross-path": dict(system="dualblade", host_budget=50_000, pipelining="cross"),
    "page cache only": dict(system="dualblade", stream="page-cache"),
    "direct only": dict(system="dualblade", stream="direct", pipelining="intra", max_tokens=600),
}


@pytest.fixture(autouse=True)
def write_early(monkeypatch):
    """Tiny models have little KV: write it block by block, so that what is read comes from the paths."""
    monkeypatch.setattr("hillinfer.systems.lossless.tensors.HELD", BLOCK)


@pytest.fixture(params=[name for name in FAMILIES if name != "mistral-sliding"])
def model(request, models):
    return models(request.param)


def generate(model, ids, cache, **kw):
    words = dict(max_new_tokens=NEW, do_sample=False, num_beams=1) | kw
    return model.generate(ids, past_key_values=cache, **words)


def full(model, ids, **kw):
    return generate(model, ids, DynamicCache(config=model.config), **kw)


def padded(prompt):
    ids = torch.cat((prompt, prompt.flip(1)))
    ids[1, :60] = 0
    return ids, (ids != 0).long()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestEqualsFull:
    def test_padded_batch_and_a_second_turn(self, model, prompt, way, tmp_path):
        ids, mask = padded(prompt)
        kept = DynamicCache(config=model.config)
        first = generate(model, ids, kept, attention_mask=mask)
        turn = torch.cat((first, ids[:, -20:]), 1)
        longer = torch.cat((mask, mask.new_ones(2, NEW + 20)), 1)
        want = generate(model, turn, kept, attention_mask=longer)
        with hillinfer.make_cache(model, drive=tmp_path, **way) as cache:
            assert torch.equal(generate(model, ids, cache, attention_mask=mask), first)
            assert torch.equal(generate(model, turn, cache, attention_mask=longer), want)
            rates, read = (
                cache.counters.rates(),
                cache.timeline.frame().query("kind in ('prefetch', 'near')").bytes.sum(),
            )
        assert (read > 0) == (way["system"] != "flexgen" or way.get("host_budget") != "1GB")
        if cache.run.settings.stream in ("direct", "page-cache"):
            assert rates["drive" if cache.run.settings.stream == "direct" else "host"] == 1
        assert not list(tmp_path.iterdir())

    def test_crop_chunks_and_reset(self, model, prompt, way, tmp_path):
        if getattr(model.config, "sliding_window", None):
            pytest.skip("transformers cannot crop a full sliding window")
        want = full(model, prompt)
        with hillinfer.make_cache(model, drive=tmp_path, **way) as cache:
            assert torch.equal(generate(model, prompt, cache, prefill_chunk_size=40), want)
            for cut in (cache.get_seq_length() - prompt.shape[1] + 3, 50):  # into the prompt, then further
                cache.crop(-cut)
                assert torch.equal(generate(model, prompt, cache), want)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.equal(generate(model, prompt, cache), want)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def geometry(kv_heads=2, head_dim=16, batch=1):
    return Geometry(batch, kv_heads, head_dim, torch.float32, torch.device("cpu"))


def tensors(folder, shape, layers=3, budget=0, host=False, **options):
    near = HostPath() if host else BlockFile(folder, direct=False)
    return Tensors(shape, layers, {NEAR: near, DIRECT: BlockFile(folder)}, lambda pinned: budget, **options)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_appends_reads_and_truncations(data, tmp_path_factory):
    """All layers, any budget, growth over several extents, prefetch or not: always the bits that went in."""
    shape = geometry(*data.draw(st.sampled_from([(2, 16, 1), (3, 32, 2), (8, 64, 1)])))
    layers, budget = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 1 << 22))
    ahead, host, cross = (data.draw(st.booleans()) for _ in range(3))
    folder, options = tmp_path_factory.mktemp("drive"), dict(prefetch=ahead, staggered=lambda: cross)
    with closing(tensors(folder, shape, layers, budget, host, **options)) as held:  # an example may be broken off
        want = [torch.empty(shape.batch, 0, *shape.record_shape) for _ in range(layers)]
        stores = [TensorStore(held, layer) for layer in range(layers)]
        for _ in range(data.draw(st.integers(1, 7))):
            n = data.draw(st.sampled_from([1, 1, 1, 40, 300, 1100]))
            cut = data.draw(st.integers(0, want[0].shape[1])) if data.draw(st.integers(0, 3)) == 0 else None
            for layer, store in enumerate(stores):
                if cut is not None:
                    store.truncate(cut)
                    want[layer] = want[layer][:, :cut]
                new = torch.randn(shape.batch, n, *shape.record_shape)
                store.append(new)
                want[layer] = torch.cat((want[layer], new), 1)
                if data.draw(st.booleans()):
                    assert torch.equal(store.all()[0], want[layer])
                    store.settle()
            assert held.plan.bound[NEAR] * BLOCK <= budget
        for store, records in zip(stores, want, strict=True):
            assert torch.equal(store.all()[0], records)
            picked = np.arange(0, store.n, 3)
            assert torch.equal(store.fetch(0, picked)[0], records[0][picked])


def test_given_a_length_each_tensor_is_one_extent(tmp_path):
    held = tensors(tmp_path, geometry(), budget=5 * BLOCK * 32, max_tokens=1000)
    for n in range(0, 1000, 250):
        for layer in range(3):
            held.append(layer, torch.randn(1, 250, 2, 2, 16), n)
    assert all(len(extents) == 1 for extents in held.plan.extents)
    assert [extents[0].path for extents in held.plan.extents] == [NEAR] * 5 + [DIRECT]
    held.close()


def test_trim_gives_the_space_back_while_the_file_is_open(tmp_path):
    file = BlockFile(tmp_path)
    file.allocate(1 << 20)
    assert os.fstat(file.fd).st_blocks * 512 >= 1 << 20
    file.trim()
    assert os.fstat(file.fd).st_blocks == 0
    file.close()


def test_each_layer_is_read_once_a_step(tmp_path):
    held = tensors(tmp_path, geometry(), layers=4, max_tokens=3000)
    for layer in range(4):
        held.append(layer, torch.randn(1, 2048, 2, 2, 16), 0)
    read = []
    real = held.read
    held.read = lambda tensor, *rest: read.append(tensor.index) or real(tensor, *rest)
    for step in range(3):
        for layer in range(4):
            held.append(layer, torch.randn(1, 1, 2, 2, 16), 2048 + step)
            held.slots.take(layer, 2049 + step)
            held.slots.release()
    held.close()
    assert all(2 <= read.count(i) <= 4 for i in range(8)), read  # three steps, and at most one prefetch too many


@pytest.mark.parametrize("system", ["flexgen", "dualblade"])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_failed_read_says_where_and_leaves_nothing(models, prompt, tmp_path, monkeypatch, system, engine):
    if engine == "io_uring" and (reason := ring.why_not()):
        pytest.skip(reason)
    model = models("llama")

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with hillinfer.make_cache(model, system, host_budget=0, drive=tmp_path, engine=engine) as cache:
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        assert ("io_uring" in cache.run.why_split()) == (engine == "io_uring")
        for tensor in cache.run.tensors.tensors:
            tensor.settle()
        monkeypatch.setattr(ring.Rings, "transfer", broken)
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(hillinfer.DriveError, match=r"read failed at layer \d, sequence 0, position \d+"):
            generate(model, torch.cat((prompt, prompt[:, :1]), 1), cache)
        monkeypatch.undo()
        cache.reset()
        assert torch.equal(generate(model, prompt, cache), full(model, prompt))
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("hillinfer")}
    assert not left and not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["flexgen", "dualblade"])
def test_interruption_leaves_nothing(models, prompt, tmp_path, way):
    model, before = models("llama"), open_files()

    class Stop:
        def __init__(self):
            self.left = 5

        def __call__(self, ids, scores):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return scores

    cache = hillinfer.make_cache(model, way, host_budget=0, drive=tmp_path)
    with pytest.raises(KeyboardInterrupt), cache:
        generate(model, prompt, cache, logits_processor=[Stop()])
    del cache
    gc.collect()
    assert not list(tmp_path.iterdir()) and open_files() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hillinfer")]


def test_beams_are_refused(models, prompt, tmp_path):
    model = models("llama")
    with (
        hillinfer.make_cache(model, "dualblade", drive=tmp_path) as cache,
        pytest.raises(hillinfer.UsageError, match="num_beams=1"),
    ):
        generate(model, prompt, cache, num_beams=3)


def test_the_report_names_budget_rung_and_pipeline(models, prompt, tmp_path):
    model = models("llama")
    with hillinfer.make_cache(model, "dualblade", drive=tmp_path, host_budget=110_000) as cache:
        generate(model, prompt, cache)
        told = cache.run.why_split()
    assert "of 6 K and V tensors in the page cache" in told and "O_DIRECT on a preallocated file" in told
    assert "path pipeline kept" in told and "ms a step" in told


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(max_tokens=0), "max_tokens"),
        (dict(pipelining="both"), "intra, cross"),
        (dict(drive_kind="emulated"), "leave out drive_kind"),
        (dict(device="/nowhere"), "does not exist"),
    ],
)
def test_wrong_settings_are_refused(models, tmp_path, wrong, words):
    model = models("llama")
    with (
        pytest.raises(hillinfer.UsageError, match=words),
        hillinfer.make_cache(model, "dualblade", drive=tmp_path, **wrong),
    ):
        pytest.fail("refused only once work had begun")


def test_a_device_is_for_systems_that_stream(tmp_path):
    with pytest.raises(hillinfer.UsageError, match="dualblade"):
        hillinfer.Settings(drive=tmp_path, device="/dev/loop0")
