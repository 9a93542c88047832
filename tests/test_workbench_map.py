"""The attention map: sums that are the weights', tiles of every zoom, tiers of the selected, and its bounds."""

import numpy as np
import pytest

from hillinfer import UsageError
from hillinfer.assets import load_embedded
from hillinfer.workbench import pyramid
from hillinfer.workbench.attention import AttentionView, show_attention
from hillinfer.workbench.cases import Case
from hillinfer.workbench.live import LiveRun
from hillinfer.workbench.observe import AttentionRecord
from hillinfer.workbench.pyramid import DECADE, EVEN, TILE, AttentionMap


def weights(heads: int, n: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).exponential(size=(heads, n)).astype(np.float32) ** 4
    return found / found.sum(1, keepdims=True)


def shares(tile: np.ndarray, map: AttentionMap, level: int) -> np.ndarray:
    """The attention in each cell that a tile stands for."""
    codes = tile[..., 0].astype(float)
    return np.where(codes > 0, 10 ** ((codes - EVEN) / DECADE) * (1 << level) / map.n, 0)


@pytest.mark.parametrize("level", [0, 1, 3])
def test_tiles_are_the_attention_in_their_cells(level):
    n, map = TILE * 8, AttentionMap()
    steps = [weights(2, n, seed) for seed in range(3)]
    for step in steps:
        map.add(0, step)
        map.add(4, step[:, ::-1])
    mean = np.mean(steps, 0).reshape(2, -1, 1 << level).sum(2)
    tile = map.tile(None, level, 0)
    assert tile.shape == (2, TILE, 2) and map.rows_of(None) == [(0, 0), (4, 0)] and map.steps == 3
    np.testing.assert_allclose(shares(tile, map, level)[0], mean.mean(0)[:TILE], rtol=0.04, atol=2e-3 / n * 2**level)
    last = map.tile(0, level, (n >> level) // TILE - 1)
    np.testing.assert_allclose(shares(last, map, level), mean[:, -TILE:], rtol=0.04, atol=2e-3 / n * 2**level)


def test_selected_and_where_it_lay():
    n, map = 1000, AttentionMap()
    map.add(0, weights(1, n), None, np.array([0, 1, 2, 900]), np.array([0, 1, 2, 2], np.uint8))
    map.add(0, weights(1, n), None, np.array([0, 1, 2]), np.array([0, 2, 2], np.uint8))
    marks = map.tile(None, 0, 0)[0, :, 1]
    assert list(marks[:4] >> 6) == [0, 1, 2, 0] and list(marks[:4] & 63) == [63, 63, 63, 0]
    coarse = map.tile(None, 1, 0)[0, :, 1]
    assert coarse[450] >> 6 == 2 and coarse[450] & 63 == 16  # one of two tokens, in one of two steps
    assert (map.tile(0, 1, 0)[:, :, 1] == coarse).all()


def test_memory_is_bounded_and_sums_stay(monkeypatch):
    monkeypatch.setattr(pyramid, "LAYERS", 40_000)
    monkeypatch.setattr(pyramid, "HEADS", 10_000)
    monkeypatch.setattr(pyramid, "PICKED", 20_000)
    map, n = AttentionMap(), 5000
    for step in range(4):  # a text that grows, with heads that come one by one
        for layer in range(3):
            for _ in range(2):
                map.add(layer, weights(1, n + step), None, np.arange(7), np.full(7, 3, np.uint8), step)
    assert map.layers.nbytes <= 40_000 and map.heads.nbytes <= 10_000 and map.picked.nbytes <= 20_000
    assert map.layers.level == 1 and map.heads.level == 4 and map.counts == {0: 2, 1: 2, 2: 2} and map.steps == 4
    assert sum(own.sum() for own in map.layers.rows.values()) == pytest.approx(24, rel=1e-4)
    assert sum(own.sum() for own in map.heads.rows.values()) == pytest.approx(24, rel=1e-4)
    assert sum(own.sum() for own in map.picked.rows.values()) == 24 * 7
    fine, top = map.tile(None, 1, 0), map.tile(None, map.top(), 0)
    assert fine.shape == top.shape == (3, TILE, 2) and shares(top, map, map.top()).sum(1) == pytest.approx(1, rel=0.04)


def test_counts_stop_before_they_would_wrap(monkeypatch):
    monkeypatch.setattr(pyramid, "MOST", 5)
    map, grid = AttentionMap(), pyramid.Grid(2048, np.uint16)
    for _ in range(8):
        map.add(0, weights(1, 50), None, np.array([3]))
    assert map.picks[0] == 5 and map.tile(None, 0, 0)[0, 3, 1] == 3 << 6 | 63  # of the first five steps
    grid.add((0, 0), np.array([0, 1]), np.array([4, 4]), 1000)
    grid.add((0, 1), np.array([0]), np.array([1]), 1000)
    assert grid.level == 1 and grid.rows[0, 0][0] == 5


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    model, tokenizer = load_embedded()
    record = AttentionRecord(exact=True, map=AttentionMap())
    options = dict(alpha=0.2, drive=tmp_path_factory.mktemp("drive"))
    run = LiveRun(model, tokenizer, Case.task(tokenizer, "lines", 1024, 2), "hillinfer", options, record)
    run.start().result()
    return run


def test_a_run_fills_the_map_with_what_it_attended_to(ended):
    map, counters = ended.record.map, ended.counters.rows
    assert map.steps == len(ended.record.steps) and len(map.counts) == 6 and map.n == counters[-1].cached
    for tier in ("device", "host", "drive"):  # as the run counted them
        served = sum(getattr(row, tier) for row in counters)
        code = pyramid.TIERS.index(tier)
        assert sum(map.picked.rows[layer, code].sum() for layer in range(6)) == served > 0
    for layer in range(6):
        blocks = [step[layer].mass.mean(0) for step in ended.record.steps.values()]
        first = sum(block[:8].sum(dtype=float) for block in blocks) / len(blocks)
        size = next(iter(ended.record.steps.values()))[layer].block
        summed = map.layers.rows[layer, 0][: 8 * size].sum() / map.seen[layer]
        assert first == pytest.approx(summed, abs=2e-3)
    text = "".join(ended.text_of(0, map.n))
    assert ended.tokenizer.decode(ended.case.context)[:200] in text and text.rstrip().endswith(ended.answer[:5])


def test_view_answers_pages_that_show_the_same(ended, monkeypatch):
    view, sent = show_attention(ended), []
    monkeypatch.setattr(view, "send", lambda *parts: sent.append(parts))
    ask = {"kind": "want", "version": view.state["version"], "tiles": [[-1, 1, 0], [2, 0, 1]], "texts": [1]}
    view._on_message(view, ask, [])
    [(message, buffers)] = sent
    assert [len(part) for part in buffers] == [6 * TILE * 2, 8 * TILE * 2]
    assert message["texts"][0][1] == ended.text_of(TILE, min(2 * TILE, ended.record.map.n))
    view._on_message(view, ask | {"version": "old"}, [])
    assert len(sent) == 1
    view.layer = 5
    view.show_map(show_attention([weights(2, 700)]).map)
    assert view.layer is None and view.state["layers"] == [0] and view.state["n"] == 700


def test_page_is_bounded():
    view = AttentionView(map_of_rows(8, 40_000), lambda first, last: ["x" * 60] * (last - first))
    page = view.html("a < b")
    assert view.state["finest"] == 0 and "a &lt; b" in page and len(page) < 4_000_000
    finer = AttentionView(map_of_rows(40, 70_000))
    assert finer.state["finest"] == 3 and len(finer.html()) < 4_000_000


def map_of_rows(layers: int, n: int) -> AttentionMap:
    return show_attention(weights(1, n, layer) for layer in range(layers)).map


def test_a_run_without_a_map_is_refused(ended):
    with pytest.raises(UsageError, match="AttentionMap"):
        show_attention(LiveRun(ended.model, ended.tokenizer, ended.case, "full", {}))
