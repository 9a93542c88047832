"""Exact decoding says what the full cache would say, whatever drafts, and however generation is to go on or stop."""

import warnings
from functools import cache, partial
from unittest import mock

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import hillinfer
from benchmarks.exact_runs import compare
from benchmarks.soak import models as tiny_models
from hillinfer.layer import Layer
from hillinfer.longbench.runner import measured
from hillinfer.speculative import LONGEST, Pace, Rounds, describe_rounds
from hillinfer.timeline import Timeline
from hillinfer.whatif.recording import decode_steps

DRAFTS = [
    ("topk", 0.1),
    ("topk", 0.5),
    ("hillinfer", 0.2),
    ("quest", 0.3),
    ("leoam", 0.3),
    ("streaming", 0.1),
    ("random", 0.1),
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not pay here")
        yield


def answer(model, ids, system, folder, exact=True, **options):
    """The sequence, and drafted and accepted tokens by round."""
    settings = {"alpha": options.pop("alpha", 0.2)}
    settings |= {"drive": folder, "host_budget": "64KiB", "pinned": 0.0} if system == "hillinfer" else {}
    with hillinfer.make_cache(model, system, **settings) as cache:
        way = {"custom_generate": hillinfer.exact} if exact else {}
        options = {"max_new_tokens": 40, "do_sample": False} | options
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **way, **options)
        assert cache.get_seq_length() == out.shape[1] - 1
        return out, [*cache.counters.rounds]


@pytest.fixture(scope="module")
def full(models):
    """Maps a family to prompts of three lengths, each with what `full` makes of it: once for all drafts."""

    @cache
    def get(family: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
        prompts = [torch.randint(5, 90, (1, 60 + 37 * i), generator=seed) for i, seed in enumerate(seeded)]
        return [(ids, answer(models(family), ids, "full", None, exact=False)[0]) for ids in prompts]

    return get


@pytest.mark.parametrize(("system", "alpha"), DRAFTS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_are_those_of_the_full_cache(models, full, family, system, alpha, tmp_path):
    for ids, want in full(family):
        got, rounds = answer(models(family), ids, system, tmp_path, alpha=alpha)
        assert torch.equal(got, want)
        assert sum(accepted for _, accepted in rounds) + len(rounds) >= 39
    assert any(drafted for drafted, _ in rounds)


def test_a_pass_over_all_records_reads_ahead(models, prompt, tmp_path, monkeypatch):
    """In blocks of 16 tokens: the next block, of this layer or the next, is being read when it is asked for."""
    model, tokens = models("llama"), prompt.repeat(1, 2)
    size = model.config.num_key_value_heads * model.config.head_dim * 2 * 4  # bytes of a record
    monkeypatch.setattr("hillinfer.tiers.tiered_store.READ", 16 * size)
    want, _ = answer(model, tokens, "full", tmp_path, exact=False)
    got, rounds = answer(model, tokens, "hillinfer", tmp_path)
    assert torch.equal(got, want) and any(drafted for drafted, _ in rounds)
    with hillinfer.make_cache(model, "hillinfer", alpha=0.1, drive=tmp_path) as cache:
        model(tokens, past_key_values=cache)
        for layer in cache.layers:  # what is still being written is read from memory
            layer.layer.store.logs[0].flush()
        cache.timeline.clear()
        model(tokens[:, :40], past_key_values=cache)
        spans = cache.timeline.frame()
    reads, ahead = (spans[spans.kind == kind].groupby("layer").bytes.sum() for kind in ("read", "prefetch"))
    assert set(ahead.index) == {0, 1, 2} and ahead.sum() > 5 * reads.sum()
    assert spans[spans.kind == "prefetch"].groupby("layer").size().min() >= tokens.shape[1] // 16 - 3


def test_the_record_has_every_round(models, prompt, tmp_path):
    model = models("llama")
    with hillinfer.make_cache(model, "hillinfer", alpha=0.2, drive=tmp_path, lookahead=False) as cache:
        options = dict(past_key_values=cache, max_new_tokens=30, do_sample=False, custom_generate=hillinfer.exact)
        out = model.generate(prompt, **options)
        frame, rounds, figures = cache.timeline.frame(), cache.counters.rounds, measured(cache, 1.0, 1.0)
        line = Timeline.load(cache.timeline.save(tmp_path / "trace.json"))
    drafted, accepted = map(sum, zip(*rounds, strict=True))
    assert f"accepted {accepted} of {drafted} drafted" in describe_rounds(rounds)
    assert accepted + len(rounds) >= out.shape[1] - prompt.shape[1] - 1 and figures["steps"] == accepted + len(rounds)
    drafts, verifies = (frame[frame.kind == kind] for kind in ("draft", "verify"))
    assert len(drafts) == len(verifies) == len(rounds) and (drafts.end_ns.values == verifies.start_ns.values).all()
    attends = frame[frame.kind == "attend"]
    inside = [
        ((span.start_ns <= attends.start_ns) & (attends.end_ns <= span.end_ns)).sum() for span in drafts.itertuples()
    ]
    assert inside == [n * model.config.num_hidden_layers for n, _ in rounds]
    assert line.busy_ms("cpu") < (verifies.end_ns.max() - drafts.start_ns.min()) / 1e6  # no span of a round counts
    steps = decode_steps(line)
    assert len(steps) == drafted and {"draft", "verify"}.isdisjoint(
        span.kind for step in steps for spans in step.threads.values() for span in spans
    )


@pytest.mark.parametrize("runs", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_random_runs(runs):
    found = compare(tiny_models(), runs, seed=runs)
    assert not found.wrong and found.ties <= runs // 100
    assert 0 < sum(accepted for _, accepted in found.rounds) < sum(drafted for drafted, _ in found.rounds)


@pytest.mark.parametrize("after", range(5, 100, 13))
def test_a_round_that_is_interrupted_leaves_a_usable_cache(models, prompt, tmp_path, after):
    """Ctrl-C in one layer of a draft or of the pass that verifies."""
    model, seen, calls = models("llama"), [], iter(range(after))
    want, _ = answer(model, prompt, "full", tmp_path, exact=False)

    class Stream(BaseStreamer):
        def put(self, value):
            seen.append(value)

        def end(self):
            raise AssertionError("nobody interrupted")

    def interrupted(layer, *args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return attend(layer, *args)

    with hillinfer.make_cache(model, "hillinfer", alpha=0.2, drive=tmp_path) as cache:
        options, attend = dict(past_key_values=cache, do_sample=False), Layer.attend
        with mock.patch.object(Layer, "attend", interrupted), pytest.raises(KeyboardInterrupt):
            way = partial(hillinfer.exact, streamer=Stream())
            model.generate(prompt, max_new_tokens=40, custom_generate=way, **options)
        ids = torch.cat((prompt, torch.cat(seen)[None]), 1)
        assert {layer.layer.n for layer in cache.layers} == {ids.shape[1] - 1}
        out = model.generate(
            ids, max_new_tokens=want.shape[1] - ids.shape[1], custom_generate=hillinfer.exact, **options
        )
    assert torch.equal(out, want)


def test_settings_of_generate_hold(models, prompt, tmp_path):
    model = models("llama")
    ids = prompt
    plain, _ = answer(model, ids, "full", tmp_path, exact=False)
    some = int(plain[0, ids.shape[1] + 11])
    for options in (
        {"eos_token_id": some, "pad_token_id": 0},
        {"eos_token_id": some, "pad_token_id": 0, "min_new_tokens": 20},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[some]]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ):
        want, _ = answer(model, ids, "full", tmp_path, exact=False, **options)
        got, _ = answer(model, ids, "topk", tmp_path, **options)
        assert torch.equal(got, want), options


def test_stopping_and_streaming_see_every_token_once(models, prompt, tmp_path):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            lengths.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] >= prompt.shape[1] + 17])

    class Stream(BaseStreamer):
        def put(self, value):
            seen.append(value.flatten())

        def end(self):
            seen.append(None)

    lengths, seen = [], []
    way = partial(hillinfer.exact, streamer=Stream())
    options = {"stopping_criteria": StoppingCriteriaList([Stop()]), "custom_generate": way}
    out, _ = answer(models("llama"), prompt, "topk", tmp_path, exact=False, **options)
    assert out.shape[1] == prompt.shape[1] + 17 and lengths == sorted(set(lengths))
    assert seen[-1] is None and torch.equal(torch.cat(seen[:-1]), out[0, prompt.shape[1] :])


def test_a_second_turn_follows(models, prompt, tmp_path):
    model, ids = models("llama"), prompt
    outs = []
    for system, way in (("full", {}), ("topk", {"custom_generate": hillinfer.exact})):
        with hillinfer.make_cache(model, system, alpha=0.2) as cache:
            options = dict(past_key_values=cache, max_new_tokens=10, do_sample=False, **way)
            first = model.generate(ids, **options)
            outs.append(model.generate(torch.cat((first, ids[:, :9]), 1), **options))
    assert torch.equal(*outs)


def test_questions_on_a_session_are_answered_as_by_full(models, prompt, tmp_path):
    model, answers, document = models("qwen2"), [], prompt[0].tolist()
    for system, way in (("full", {}), ("hillinfer", {"custom_generate": hillinfer.exact})):
        options = {"drive": tmp_path} if way else {}
        with hillinfer.keep_session(tmp_path / "a.kv", model, document, system, alpha=0.1, **options) as cache:
            for question in ([5, 6, 7], [8, 9]):  # each on the document alone
                ids = torch.tensor([document + question])
                answers.append(model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False, **way))
                cache.crop(len(document))
    assert all(map(torch.equal, answers[:2], answers[2:]))


def test_rejection_sampling_draws_from_the_full_models_distribution():
    """20,000 tokens drafted from another distribution: chi-square with 5 degrees of freedom, at one in 10,000."""
    torch.manual_seed(0)
    rounds = object.__new__(Rounds)
    rounds.processor, rounds.sample = lambda ids, logits: logits, True
    logits, other, draws = torch.randn(1, 6), torch.randn(1, 6), 20_000
    true, counts = logits.softmax(-1)[0], torch.zeros(6)
    for _ in range(draws):
        drafted, guessed = rounds.choose(None, other)
        counts[rounds.judge(None, logits, drafted, guessed)[0]] += 1
    assert float(((counts - draws * true) ** 2 / (draws * true)).sum()) < 25.7
    assert float((other.softmax(-1)[0] - true).abs().sum()) > 0.5  # the draft alone would be far off


def test_samples_have_the_full_models_distribution(models, prompt, tmp_path):
    """Two sampled tokens, the second drafted by a selection that sees little, against all pairs' true probabilities."""
    model, ids, draws = models("llama"), prompt[:, :40], 120
    counts: dict[tuple, int] = {}
    torch.manual_seed(1)
    for _ in range(draws):
        options = dict(do_sample=True, temperature=0.7, top_k=3, max_new_tokens=2)
        pair = answer(model, ids, "random", tmp_path, alpha=0.15, **options)[0][0, -2:].tolist()
        counts[tuple(pair)] = counts.get(tuple(pair), 0) + 1

    def following(*tokens: int) -> list[tuple[int, float]]:
        with torch.no_grad():
            logits = model(torch.cat((ids, torch.tensor([tokens], dtype=torch.long)), 1)).logits[0, -1] / 0.7
        best = logits.topk(3)
        return list(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    expected = {(a, b): draws * p * q for a, p in following() for b, q in following(a)}
    assert counts.keys() <= expected.keys()
    statistic = sum((counts.get(pair, 0) - mean) ** 2 / mean for pair, mean in expected.items())
    assert statistic < 31.8  # chi-square with 8 degrees of freedom, at one in 10,000


@pytest.mark.parametrize(
    ("system", "rows", "words"),
    [("full", 1, "attends to all"), ("h2o", 1, "taken back"), ("topk", 2, "one sequence")],
)
def test_what_cannot_be_taken_back_is_refused(models, prompt, system, rows, words, tmp_path):
    with pytest.raises(hillinfer.UsageError, match=words):
        answer(models("llama"), prompt.repeat(rows, 1), system, tmp_path)


def test_padding_is_refused(models, prompt):
    model, mask = models("llama"), torch.ones_like(prompt)
    mask[:, :3] = 0
    with hillinfer.make_cache(model, "topk") as cache, pytest.raises(hillinfer.UsageError, match="without padding"):
        model.generate(prompt, attention_mask=mask, past_key_values=cache, custom_generate=hillinfer.exact)


def test_a_draft_ends_where_its_model_is_unsure():
    pace = Pace()
    for _ in range(60):  # of two tokens the surer one is right
        pace.note(2, 1, 0.2, 1.0, [0.99, 0.3])
    sure, unsure = pace.chance(0.99), pace.chance(0.3)
    assert sure > 0.95 and unsure < 0.2
    assert pace.goes_on(1, sure) and not pace.goes_on(2, sure * unsure)


def test_a_draft_is_as_long_as_pays():
    gammas: list[int] = []

    def settled(accepted: float, draft_s: float, verify_s: float) -> Pace:
        pace = Pace()
        for _ in range(60):
            gammas.append(pace.gamma)
            pace.note(pace.gamma, round(accepted * pace.gamma), draft_s * pace.gamma, verify_s)
        return pace

    assert settled(1.0, 0.01, 1.0).gamma == LONGEST
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gammas.clear()
        settled(0.0, 0.5, 1.0)
    assert sum(gammas) < 30  # most rounds rest
    assert 1 <= settled(0.7, 0.2, 1.0).gamma <= 8
