"""The hot pool keeps its size, its pins and the hit table's order."""

import math

import numpy as np
import pytest
import torch

import hillinfer
from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.hits import ONE, LastUse, LayerHits, SharedHits
from hillinfer.tiers.pool import ABSENT, DEMOTED, HotPool
from hillinfer.tiers.records import Records, Selection

SHAPE = Geometry(1, 1, 2, torch.float32, torch.device("cpu"))


def records(tokens) -> torch.Tensor:
    """Records that say which token they are."""
    return torch.as_tensor(np.asarray(tokens), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, *SHAPE.record_shape)


def fetched(tokens) -> Selection:
    return Selection([(np.arange(len(tokens)), Records(records(tokens).contiguous()))])


def pool_with(capacity: int, tokens, n: int) -> HotPool:
    hits = SharedHits(1)
    hits.extend(n)
    pool = HotPool(SHAPE, 0, hits)
    pool.resize(capacity)
    pool.admit(np.asarray(tokens), records(tokens))
    return pool


def resident(pool: HotPool) -> list[int]:
    held = np.sort(pool.token_of[pool.token_of >= 0])
    slots = pool.slots(held)
    assert torch.equal(pool.records.view()[slots], records(held))  # what is found is the token's own record
    return held.tolist()


def test_it_keeps_the_newest_that_fit():
    assert resident(pool_with(4, range(10), 10)) == [6, 7, 8, 9]


def test_a_new_token_takes_the_least_hit_unpinned_slot():
    pool = pool_with(4, range(4), 10)
    pool.pinned_from = 3
    pool.hits.rank[0, :4] = [5, 1, 2, 0]  # token 3 has the fewest hits but is pinned
    pool.admit(np.array([4]), records([4]))
    assert resident(pool) == [0, 2, 3, 4]
    assert pool.slots(np.array([1, 7, 0]))[:2].tolist() == [DEMOTED, ABSENT]


def test_promotion_swaps_only_where_it_pays():
    pool = pool_with(3, [7, 8, 9], 10)
    pool.pinned_from = 9
    pool.hits.rank[0, :10] = [4, 1, 0, 0, 0, 0, 0, 2, 1, 0]
    assert pool.swap(np.array([0, 1]), fetched([0, 1])) == 1  # 0 (4 hits) replaces 8 (1); 1 does not outrank 7 (2)
    assert resident(pool) == [0, 7, 9]


def test_promotion_fills_free_slots_first():
    pool = pool_with(3, [9], 10)
    assert pool.swap(np.array([1, 2, 3]), fetched([1, 2, 3])) == 2
    assert resident(pool) == [1, 2, 9]


def test_pinned_tokens_never_leave():
    pool = pool_with(3, [7, 8, 9], 10)
    pool.pinned_from = 7
    pool.hits.rank[0, 1] = 60
    assert pool.swap(np.array([1]), fetched([1])) == 0
    assert resident(pool) == [7, 8, 9]


def test_a_smaller_pool_keeps_the_most_hit_and_the_pinned():
    pool = pool_with(6, [1, 2, 3, 7, 8, 9], 10)
    pool.pinned_from = 8
    pool.hits.rank[0, [1, 2, 3, 7]] = [5, 9, 1, 2]
    pool.resize(4)
    assert resident(pool) == [1, 2, 8, 9]
    assert pool.records.view()[pool.slots(np.array([1, 2, 8, 9]))][:, 0, 0, 0].tolist() == [1, 2, 8, 9]
    assert (pool.slots(np.array([3, 7])) == DEMOTED).all()
    pool.resize(1)
    assert resident(pool) == [8, 9]  # what is pinned stays


def test_truncation_forgets():
    pool = pool_with(4, [2, 5, 6, 7], 8)
    pool.truncate(6)
    assert resident(pool) == [2, 5]
    pool.admit(np.array([6]), records([66]))
    assert pool.records.view()[pool.slots(np.array([6]))].unique().item() == 66


def test_the_papers_table_saturates_ages_and_takes_two_bytes_a_token():
    hits = SharedHits(2)
    hits.extend(5)
    hits.rank[1, 2] = 65_535
    hits.touch(1, np.array([2, 3]))
    assert hits.rank[1, :5].tolist() == [0, 0, 65_535, 1, 0]
    for _ in range(64):
        hits.age()
    assert hits.rank[1, :5].tolist() == [0, 0, 32_767, 0, 0]
    assert hits.nbytes == 2 * 2 * 5


def test_a_layers_counters_saturate_and_fade():
    hits = LayerHits(1)
    hits.extend(4)
    for _ in range(300):
        hits.touch(0, np.array([1]))
    assert hits.rank[0, 1] == 65_535
    hits.touch(0, np.array([2]))
    hits.age()
    assert hits.rank[0, :4].tolist() == [0, 65_535 - 65_535 // 8, ONE - ONE // 8, 0]
    assert hits.nbytes == 2 * 4


def test_the_control_ranks_by_last_use():
    table = LastUse(1)
    table.extend(4)
    table.touch(0, np.array([0, 1]))
    table.touch(0, np.array([0, 2]))
    assert table.rank[0, :4].tolist() == [2, 1, 2, 0]
    table.truncate(2)
    assert table.rank[0, :4].tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("pinned", [0.0, 0.1, 0.6])
def test_how_much_is_pinned_is_a_setting(models, prompt, tmp_path, pinned):
    model = models("llama")
    with hillinfer.make_cache(model, "hillinfer", alpha=0.2, recent=4, drive=tmp_path, pinned=pinned) as cache:
        model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
        for layer in (layer.layer for layer in cache.layers):
            (pool,), n = layer.store.pools, layer.n
            assert pool.pinned_from == n - math.ceil(pinned * n)
            assert len(pool.token_of) == max(int(0.4 * n), int(pinned * n)) + 1
            newest = set(range(pool.pinned_from, n)) - set(range(n - 4, n))  # the window has the last ones
            assert newest <= set(pool.token_of.tolist())


@pytest.mark.parametrize("pinned", [-0.1, 1.1, "all"])
def test_a_bad_share_is_refused(pinned):
    with pytest.raises(UsageError, match="pinned"):
        Settings(pinned=pinned)


def test_a_token_is_fresh_until_a_step_has_read_it(models, prompt, tmp_path):
    with hillinfer.make_cache(models("llama"), "hillinfer", alpha=0.1, drive=tmp_path, pinned=0) as cache:
        models("llama")(prompt, past_key_values=cache)
        store = cache.layers[0].layer.store
        far = np.arange(store.n)[store.window.far(np.arange(store.n))]
        tokens = far[store.pools[0].slots(far) == ABSENT][:9]
        for fresh in (9, 0):
            served = store.find(0, tokens)[1]
            assert (served.drive, served.fresh, served.demoted) == (9, fresh, 0)
        assert store.find(0, tokens, for_step=False)[1].drive == 9
        store.settle()  # those that it promotes are demoted when others come
        assert store.find(0, tokens)[1].fresh == 0
