"""Bounds are valid, the pruned search equals an exhaustive one, and pages round-trip through the drive."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hillinfer
from hillinfer.systems.boxes import bounds
from hillinfer.systems.leoam.pages import Pages
from hillinfer.systems.leoam.tree import (
    LEAF,
    LEAVES,
    NODES,
    PAGE,
    SIZE,
    START,
    ChunkTree,
    first_token,
    nearest,
    overlapping,
)
from hillinfer.tiers.block_file import BLOCK
from hillinfer.tiers.record_file import RecordFile
from hillinfer.timeline import Counters, Timeline, Track

HEADS, DIM = 2, 8
SHAPE = (NODES, HEADS, 2, DIM)


def tree_of(keys: torch.Tensor, cuts: list[int], pages=None) -> ChunkTree:
    """Keys (Hkv, n, D) appended in parts that end at these places."""
    tree, start = ChunkTree(HEADS, DIM, pages or Pages(SHAPE)), 0
    for end in [*sorted({min(cut, keys.shape[1]) for cut in cuts}), keys.shape[1]]:
        tree.append(keys[:, start:end])
        start = end
    return tree


def draw_keys(seed: int, n: int, whole: bool = False) -> torch.Tensor:
    """With deserts and peaks; `whole` gives small integers, whose scores tie and whose sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    if whole:
        keys = torch.randint(-3, 4, (HEADS, n, DIM), generator=generator).float()
        keys[:, 5::PAGE] = 63.0  # so that a page's scale is 1/2, and its boxes are exact too
        return keys
    scale = torch.rand((1, n // 50 + 1, 1), generator=generator).repeat_interleave(50, 1)[:, :n] ** 4
    return torch.randn((HEADS, n, DIM), generator=generator) * scale


def all_nodes(tree: ChunkTree, first: int = 0, last: int | None = None) -> np.ndarray:
    return overlapping(np.arange(tree.cut.size), first, tree.n if last is None else last)


def all_leaves(tree: ChunkTree, first: int = 0, last: int | None = None) -> np.ndarray:
    nodes = all_nodes(tree, first, last)
    return nodes[nodes % NODES >= LEAVES]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 900), st.lists(st.integers(1, 900), max_size=4), st.integers(0, 900))
def test_no_key_scores_above_its_chunks_bounds(seed, n, cuts, crop):
    keys = draw_keys(seed, n)
    tree = tree_of(keys, cuts)
    if 0 < crop < n:  # after a crop boxes may be wider than need be, never narrower
        tree.truncate(crop)
        keys = torch.cat((keys[:, :crop], draw_keys(seed + 1, 37)), 1)
        tree.append(keys[:, crop:])
    query = draw_keys(seed + 2, 3)
    page, node = np.divmod(all_nodes(tree), NODES)
    score = bounds(tree.boxes(all_nodes(tree)), query).amax(2)
    true = (query @ keys.transpose(1, 2)).amax(1)  # (Hkv, n)
    for i in range(len(page)):
        start = page[i] * PAGE + START[node[i]]
        best = true[:, start : start + SIZE[node[i]]].amax(1)
        assert (score[:, i] >= best - 1e-4 * best.abs() - 1e-5).all()
    parent = {(p, c): i for i, (p, m) in enumerate(zip(page, node, strict=True)) for c in range(4 * m + 1, 4 * m + 5)}
    for i in np.flatnonzero(node > 0):
        assert (score[:, parent[page[i], node[i]]] >= score[:, i] - 1e-4 * score[:, i].abs() - 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 900), st.integers(0, 40), st.integers(0, 20), st.booleans())
def test_the_pruned_search_finds_what_an_unpruned_one_does(seed, n, k, first, whole):
    """At every step of a sequence in which the cut moves and the tree grows; ties included, where sums are exact."""
    keys = draw_keys(seed, n + 8, whole)
    tree = tree_of(keys[:, :n], [])
    for step in range(8):
        query = draw_keys(seed + step, 3, whole)
        last = tree.n - 5
        found, evaluated = tree.search(query, k, first, last)
        leaves = all_leaves(tree, first, last)
        want = first_token(leaves[nearest(tree.scores(leaves, query)[1], k)])
        if whole or not len(want):  # elsewhere the last bit of a sum may depend on the shape of the product
            np.testing.assert_array_equal(found, want)
        else:
            assert len(found) == len(want)
            assert len(np.setdiff1d(found, want)) <= 1
        assert evaluated <= len(all_nodes(tree, first, last))
        tiles = np.concatenate(
            [np.arange(s, s + SIZE[m]) + p * PAGE for p, m in np.argwhere(tree.cut) for s in [START[m]]]
        )
        assert len(tiles) == len(np.unique(tiles)) == len(tree.cut) * PAGE  # the cut covers every token once
        tree.append(keys[:, n + step : n + step + 1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(100, 600), st.integers(1, 30))
def test_with_exact_bounds_the_chunks_are_those_of_the_true_scores(seed, n, k):
    """Members of a chunk are equal here, so that a bound is a score."""
    keys = draw_keys(seed, n // LEAF + 1, whole=True).repeat_interleave(LEAF, 1)[:, :n]
    tree = ChunkTree(HEADS, DIM, Pages(SHAPE))
    tree.append(keys[:, : n % PAGE or PAGE])  # in the growing page boxes are float32: nothing is rounded
    keys = keys[:, : tree.n]
    if tree.full:
        return
    query = draw_keys(seed + 1, 2, whole=True)
    found, _ = tree.search(query, k, 0, tree.n)
    true = (query @ keys.transpose(1, 2)).flatten(0, 1)[:, ::LEAF].numpy()
    np.testing.assert_array_equal(found // LEAF, nearest(true, k))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 900), st.floats(-5, 15))
def test_below_the_floor_is_a_desert(seed, n, level):
    """The search then finds the best of the leaves that reach it for some query head, and only those."""
    tree, floor = tree_of(draw_keys(seed, n), []), torch.full((HEADS, 3), level)
    for step in range(4):
        query = draw_keys(seed + step, 3)
        found, _ = tree.search(query, 20, 0, n, floor=floor)
        leaves, score = tree.scores(all_leaves(tree), query, floor)
        want = first_token(leaves[nearest(score, 20)])
        assert abs(len(found) - len(want)) <= 1 and len(np.setdiff1d(found, want)) <= 1  # 1: a sum's last bit


def test_deserts_are_merged_and_peaks_split():
    keys = torch.zeros(HEADS, 8 * PAGE, DIM)
    keys[:, 3 * PAGE : 3 * PAGE + 20] = 5.0
    tree, query = tree_of(keys + 0.01 * torch.randn(keys.shape), []), torch.ones(HEADS, 1, DIM)
    counts = [tree.search(query, 5, 0, tree.n)[1] for _ in range(40)]
    assert counts[-1] <= 8 + 3 * 4 + 8 and counts[-1] < tree.n / LEAF / 8
    assert tree.cut[3, LEAVES : LEAVES + 5].all() and tree.cut[[0, 1, 5, 6], 0].all()


@pytest.mark.parametrize("capacity", [None, 1, 3])
def test_pages_from_the_drive_are_those_of_memory(tmp_path, capacity):
    keys, query = draw_keys(5, 2500), draw_keys(6, 3)
    drive, track = RecordFile(tmp_path, 4096, 1), Track(Timeline(), Counters(), 3)
    try:
        tree, twin = tree_of(keys, [700], Pages(SHAPE, drive, 0, capacity, track)), tree_of(keys, [700])
        for n in (2500, 1400, 300):
            tree.truncate(n)
            twin.truncate(n)
            for k in (3, 40):
                found, evaluated = tree.search(query, k, 0, n)
                want, same = twin.search(query, k, 0, n)
                assert evaluated == same and np.array_equal(found, want)
        if capacity:
            assert tree.pages.nbytes <= capacity * tree.pages.page_bytes
            read = track.timeline.spans
            assert read and all((span.lane, span.kind, span.layer) == ("drive", "abstract", 3) for span in read)
            assert all(span.bytes and span.bytes % BLOCK == 0 for span in read)
        size = drive.size
        for part in (tree, twin):
            part.append(keys[:, 300:])
        assert drive.size == size  # the room of forgotten pages is used again
        assert np.array_equal(tree.search(query, 30, 0, 2500)[0], twin.search(query, 30, 0, 2500)[0])
    finally:
        drive.close()


def test_boxes_are_ranked_by_the_distance_to_a_heads_best():
    scores = np.array([[9, 8, 7, 0, 0], [100, 100, 100, 101.5, 103]], np.float32)
    assert nearest(scores, 2).tolist() == [0, 4] and nearest(scores, 4).tolist() == [0, 1, 3, 4]
    assert nearest(scores, 9).tolist() == [0, 1, 2, 3, 4] and not len(nearest(scores[:, :0], 3))


def test_bounds_split_the_query_by_sign():
    boxes, query = torch.tensor([[[[2.0, 3.0], [-1.0, 1.0]]]]), torch.tensor([[[1.0, -1.0], [-2.0, 1.0]]])
    assert bounds(boxes, query, 0.0).flatten().tolist() == [-1.5, 1.0]  # of the boxes' middles, 0.5 and 2
    assert bounds(boxes, query).flatten().tolist() == [1.0, 5.0]  # 1 * 2 - 1 * 1, and -2 * -1 + 1 * 3


@pytest.mark.parametrize("max_tokens", [None, 460])
def test_a_host_budget_holds_pool_and_abstracts(models, prompt, tmp_path, max_tokens):
    """Pool and abstracts together stay within it, and what does not fit changes no token."""
    model = models("llama")
    ids, new = prompt.repeat(1, 3)[:, :400], dict(max_new_tokens=60, do_sample=False)
    budget = 120_000
    options = dict(drive=tmp_path, host_budget=budget, compress=0, max_tokens=max_tokens)
    with hillinfer.make_cache(model, "leoam", alpha=0.2, **options) as cache:
        out = model.generate(ids, past_key_values=cache, **new)
        pools = sum(pool.nbytes for layer in cache.layers for pool in layer.layer.store.pools)
        pages = sum(tree.pages.nbytes for layer in cache.layers for tree in layer.layer.policy.trees)
        assert pools + pages <= budget
        assert (cache.run.index_budget > budget // 4) == bool(max_tokens)  # no length, no more: it may grow
        assert any(span.detail.get("bounds") for span in cache.timeline.spans)
    with hillinfer.make_cache(model, "leoam", alpha=0.2) as cache:  # all in memory: the same tokens
        assert torch.equal(model.generate(ids, past_key_values=cache, **new), out)
