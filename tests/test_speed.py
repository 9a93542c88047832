"""The benchmarks of whole steps, at small sizes: their measurements match their descriptions."""

import numpy as np
import pytest
import torch

from benchmarks import growth, micro, real, shape
from benchmarks.stack import SHAPES, WARM, Field, Stack
from benchmarks.trace import Trace
from hillinfer import native

TINY, N, STEPS = SHAPES["tiny"], 512, 8


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    """Two documents of 256 tokens, two layers, eight steps; a tenth of the tokens each, the window among them."""
    rng, picks = np.random.default_rng(3), {}
    for number in range(2):
        picks[f"n-{number}"] = np.array([256, 2, STEPS + 1])
        for step in range(STEPS + 1):
            for layer in range(2):
                for kind in ("true", "guess"):
                    chosen = np.sort(rng.choice(256, 26, replace=False)).astype(np.int32)
                    picks[f"{kind}-{number}-{step}-{layer}"] = chosen
                picks[f"sure-{number}-{step}-{layer}"] = np.sort(rng.choice(chosen, 15, replace=False))  # of the guess
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    np.savez(path, **picks)
    return Trace(path)


def test_a_trace_is_laid_side_by_side(trace):
    both = trace.positions(N, 2, 1)  # the third of a model of three is the second of two
    np.testing.assert_array_equal(both[both < 256], trace.picks["true-0-1-1"])
    np.testing.assert_array_equal(both[both >= 256] - 256, trace.picks["true-1-1-1"])


@pytest.mark.parametrize(
    ("precision", "alpha", "ahead"), [("int8", 0.3, True), ("int4", 0.3, True), ("int8", 0.12, 0.6)]
)
def test_scores_select_what_was_recorded(trace, tmp_path, precision, alpha, ahead):
    field = Field(TINY, trace, N, STEPS)
    options = {"alpha": alpha, "drive": tmp_path, "precision": precision, "lookahead": ahead, "sinks": 0, "recent": 1}
    stack, chosen = Stack("hillinfer", field, "hillinfer", options), {}
    with torch.inference_mode():
        stack.open()
        for layer in stack.layers:
            select = layer.policy.select

            def noted(step, select=select):
                chosen[step.layer, step.guess] = select(step)
                return chosen[step.layer, step.guess]

            layer.policy.select = noted
        for step in range(3):
            stack.step(step)
            for (layer, guess), picked in chosen.items():
                kind = ("sure" if ahead == 0.6 else "guess") if guess else "true"
                wanted = trace.positions(N, layer, step + 1, kind)
                assert np.isin(wanted, picked).all()
    assert {guess for _, guess in chosen} == {True, False}
    stack.cache.close()


def test_systems_take_turns_on_a_shape(trace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shape.Bounds, "size", 1 << 27)
    with torch.inference_mode():
        result = shape.measure(
            Field(TINY, trace, N, STEPS), shape.ways_of(("hillinfer", "flexgen")), tmp_path, 4, lambda _: None
        )
    own, _, larger, streamed, equal = result["rows"]
    assert 0 < larger["drive_mb"] < own["drive_mb"] and equal["drive_mb"] < streamed["drive_mb"]
    assert 0.7 < larger["kv_memory_mb"] / own["kv_memory_mb"] < 1.15  # at 512 tokens, scales and zero points count
    if native.available():
        assert own["scored_mb"] > 0
    shape.show(result)
    assert "flexgen, equal memory" in capsys.readouterr().out
    assert shape.ratio(result, "flexgen", "flexgen") == (1, 1, 1)
    low, middle, high = shape.ratio(result, "flexgen", "hillinfer")
    assert low < middle < high


def test_what_is_all_in_memory_is_beside_transformers(trace, tmp_path, monkeypatch):
    monkeypatch.setattr(shape.Bounds, "size", 1 << 27)
    with torch.inference_mode():
        rows = shape.in_memory("tiny", trace, N, tmp_path, 4, lambda _: None)["rows"]
    by = {row["system"]: row for row in rows}
    whole = TINY.token_bytes * (N + WARM) / 1e6  # of all tokens there are
    assert by["DynamicCache"]["attended_mb"] == pytest.approx(whole, rel=0.05)
    if native.available():
        assert by["full"]["attended_mb"] == pytest.approx(whole, rel=0.05)
        assert by["topk"]["attended_mb"] < 0.2 * by["full"]["attended_mb"]
        assert by["topk, int4"]["scored_mb"] == pytest.approx(by["topk"]["scored_mb"] / 2, rel=0.05)


def test_slopes_are_exponents():
    rows = [{"system": name, "tokens": n, "ms": n**power} for n in (2, 4, 8, 16, 32)
            for name, power in (("flat", 0), ("linear", 1))]  # fmt: skip
    assert growth.slopes(rows) == pytest.approx({"flat": 0, "linear": 1}, abs=1e-9)


def test_real_systems_take_turns(tmp_path):
    ways = {name: real.WAYS[name] for name in ("DynamicCache", "full", "topk", "hillinfer")}
    with torch.inference_mode():
        result = real.measure((200,), tmp_path, ways, 2)
    assert [row["system"] for row in result["rows"]] == list(ways)
    assert result["rows"][3]["drive_mb"] > 0 == result["rows"][2]["drive_mb"]


@pytest.mark.skipif(not native.available(), reason="the rows are kernels")
def test_kernels_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(micro, "TOKENS", 1024)
    monkeypatch.setattr(micro, "CHOSEN", 300)
    result = micro.measure(tmp_path, repeats=1)
    assert all(row["ms"] > 0 for row in result["rows"]) and all(row["us"] > 0 for row in result["seam"])
