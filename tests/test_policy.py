"""A new policy is one file under 60 lines and one line in the registry; then it is everywhere."""

import importlib.util

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hillinfer

SOURCE = '''
"""Every second token of those that are not near."""

import numpy as np

from hillinfer.evaluator.policy import Policy, Step


class EverySecond(Policy):
    """Sinks, recent tokens and every second of the rest, newest first."""

    needs_codes = False

    def select(self, step: Step) -> np.ndarray:
        near = step.near()[-step.budget :]
        rest = np.setdiff1d(np.arange(step.n), near)[::-2][: step.budget - len(near)]
        return np.sort(np.concatenate((near, rest)))
'''


@pytest.fixture
def every_second(tmp_path, monkeypatch):
    path = tmp_path / "every_second.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("every_second", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(SOURCE.strip().splitlines()) < 60
    monkeypatch.setitem(hillinfer.POLICIES, "every-second", module.EverySecond)  # the one registry line


def test_a_new_policy_is_a_system_at_once(every_second, models, prompt, tmp_path):
    assert "every-second" in hillinfer.list_systems()
    model = models("llama")
    with hillinfer.make_cache(model, "every-second", alpha=0.3, drive=tmp_path) as cache:
        out = model.generate(prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert out.shape[1] == prompt.shape[1] + 5
        assert all(row.attended <= 0.3 * row.cached + 1 for row in cache.counters.rows)


def test_a_new_policy_is_in_the_command_line(every_second, tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_text("line a-b: REGISTER_CONTENT is <12345>\n" * 20)
    from hillinfer.commands.app import app

    words = ["run", "--model", "embedded", "--prompt-file", text, "--system", "every-second", "--max-new-tokens", 3]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0 and "every-second" in result.stderr


@pytest.mark.parametrize(
    "bad", [np.array([5, 3]), np.array([3, 3]), np.array([10**6]), np.arange(100), np.zeros(0, int), [1, 2]]
)
def test_a_wrong_selection_is_an_error_that_names_the_policy(models, prompt, bad):
    class Wrong(hillinfer.Policy):
        needs_codes = False

        def select(self, step):
            return bad

    model = models("llama")
    cache = hillinfer.TieredCache(model.config, Wrong, hillinfer.Settings(alpha=0.3))
    with pytest.raises(hillinfer.UsageError, match=r"Wrong\.select"):
        model.generate(prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)


def step_with(scores: np.ndarray, budget: int) -> hillinfer.Step:
    return hillinfer.Step(len(scores), budget, sinks=2, recent=3, layer=0, step=0, scores=lambda: scores, weights=None)


def test_topk_takes_the_window_and_the_best_of_the_rest():
    scores = np.zeros(20, np.int32)
    scores[7], scores[11] = 9, 5
    picked = hillinfer.POLICIES["topk"]().select(step_with(scores, 8))
    assert picked.tolist() == [0, 1, 2, 7, 11, 17, 18, 19]  # 2: the tie goes to the lowest position


def test_streaming_takes_sinks_and_the_newest():
    picked = hillinfer.POLICIES["streaming"]().select(step_with(np.zeros(20, np.int32), 8))
    assert picked.tolist() == [0, 1, 14, 15, 16, 17, 18, 19]


def test_weights_are_the_models_own_attention(models, prompt):
    """What a policy sees as exact weights equals what eager attention returns."""
    model = models("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(prompt, output_attentions=True).attentions
    seen = {}

    class Watch(hillinfer.Policy):
        needs_codes = False

        def select(self, step):
            seen[step.layer] = step.weights()

    cache = hillinfer.TieredCache(model.config, Watch)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
        model(prompt[:, -1:], past_key_values=cache)
    model.set_attn_implementation("sdpa")
    for layer, weights in seen.items():
        np.testing.assert_allclose(weights, want[layer][0, :, -1].numpy(), atol=1e-5)
    assert len(seen) == model.config.num_hidden_layers


def test_the_oracle_takes_the_heaviest_tokens():
    weights = np.array([[0.5, 0.1, 0.1, 0.3], [0.1, 0.1, 0.7, 0.1]], np.float32)
    step = hillinfer.Step(4, 2, sinks=0, recent=1, layer=0, step=0, scores=None, weights=lambda: weights)
    assert hillinfer.POLICIES["oracle"]().select(step).tolist() == [0, 2]
