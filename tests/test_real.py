"""A pretrained model on real text: exact at the full budget, faithful in the known order, the same from a session.

HILLINFER_REAL_MODEL names the model, a folder, a hub id or a GGUF file; `.ci/run` sets it to SmolLM2-135M-Instruct.
"""

import os

import pytest
from transformers import DynamicCache

from hillinfer import load_model, make_cache, open_session, save_session
from hillinfer.assets import data_folder
from hillinfer.longbench.forced import force_each
from hillinfer.longbench.prompts import Prompt
from hillinfer.longbench.runner import decode, feed

NAME = os.environ.get("HILLINFER_REAL_MODEL")
NEW = 12
pytestmark = pytest.mark.skipif(not NAME, reason="HILLINFER_REAL_MODEL names no model")


@pytest.fixture(scope="module")
def real():
    return load_model(NAME, "float32")


@pytest.fixture(scope="module")
def ids(real):
    """The first tokens of a novel."""
    text = (data_folder("text") / "persuasion.txt").read_text(encoding="utf-8")[:8000]
    return real[1](text).input_ids[:1000]


def test_from_the_drive_and_looking_ahead_all_tokens_give_the_same_answer(real, ids, tmp_path):
    model, ids = real[0], ids[:600]
    want = decode(model, DynamicCache(config=model.config), ids, NEW).tolist()
    options = dict(alpha=1.0, host_budget="4MiB", lookahead=True, drive=tmp_path)
    with make_cache(model, "hillinfer", **options) as cache:
        assert decode(model, cache, ids, NEW).tolist() == want
        assert cache.counters.rates()["drive"] > 0.5
        assert any(span.kind == "prefetch" for span in cache.timeline.spans)


def test_fidelity_has_its_order(real, ids):
    """The exact weights choose best, then their INT8 codes, then a window that sees neither."""
    prompt = Prompt(ids[:-32], len(ids) - 48, len(ids), truncated=False)
    ways = {name: (name, {"alpha": 0.1}) for name in ("full", "oracle", "topk", "streaming")}
    kl = {forced.variant: forced.kl for forced in force_each(*real, prompt, ids[-32:], ways, together=True)}
    assert kl["full"] == 0 < kl["oracle"] < kl["topk"] < kl["streaming"], kl


def test_a_session_gives_the_same_answer(real, ids, tmp_path):
    (model, tokenizer), options = real, dict(alpha=0.1, drive=tmp_path)
    document = ids[:600]
    with make_cache(model, "hillinfer", **options) as cache:
        feed(model, cache, document)
        save_session(cache, tmp_path / "novel.kv", model, document, tokenizer)
        want = decode(model, cache, ids[:601], NEW).tolist()
    cache, back = open_session(tmp_path / "novel.kv", model, "hillinfer", tokenizer, **options)
    with cache:
        assert decode(model, cache, [*back, ids[600]], NEW).tolist() == want
