"""Replay of recorded runs on other hardware: cases solved by hand, conservation, scaling and monotonicity."""

from collections import Counter, defaultdict
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

import hillinfer
from hillinfer.systems.hillinfer.profile import Cost, Profile, Rate
from hillinfer.systems.shapes import SHAPES, ModelShape, find_shape, shape_of
from hillinfer.timeline import Span, Timeline
from hillinfer.whatif import replay as R
from hillinfer.whatif.devices import find_profile
from hillinfer.whatif.recording import decode_steps, describe, exclusive_seconds, read_summary
from hillinfer.workbench.figures import timeline_figure

MS = 1_000_000
SMALL = ModelShape("small", 2, 4, 2, 16, 64, 96, 97, width=4)
ABOUT = dict(shape=asdict(SMALL), batch=1, cached=100.0, attended=20.0, pool=0.5, drive=0.25)
COSTS = dict(append=1, score=4, guess=1, select=2, read=6, prefetch=6, attend=3, dense=5, head=7, gather=1, other=0)


def box(**kinds: float) -> Profile:
    """A machine where every kind of work takes its own number of milliseconds."""
    numbers = {name: Rate((1e9,), "assumed: test") for name in ("memory", "bandwidth", "flops", "read", "write")}
    cpu = {name: numbers[name] for name in ("memory", "bandwidth", "flops")} | {"lanes": Rate((2,), "assumed: test")}
    drive = {name: numbers[name] for name in ("read", "write")}
    costs = {kind: Cost((1e18,), (max(ms, 1e-12) / 1e3,)) for kind, ms in (COSTS | kinds).items()}
    return Profile("hand", "a test", {"cpu": cpu, "drive": drive}, costs)


def by_hand(*spans: tuple) -> Timeline:
    """(thread, lane, kind, layer, step, start, end, bytes) in ms."""
    line = Timeline()
    line.about = {"system": "mine", **ABOUT}
    for thread, lane, kind, layer, step, start, end, nbytes in spans:
        line.spans.append(Span(lane, kind, layer, step, start * MS, end * MS, nbytes, {}, thread))
    return line


def plain_step(step: int = 0, at: int = 0) -> list[tuple]:
    """Two layers without lookahead; recorded times are of no importance, only their order is."""
    out = []
    for layer in range(2):
        t = at + 20 * layer
        out += [
            ("main", "cpu", "append", layer, step, t, t + 1, 10),
            ("main", "cpu", "score", layer, step, t + 1, t + 2, 1000),
            ("main", "cpu", "select", layer, step, t + 1, t + 3, 0),  # around its score
            ("main", "drive", "read", layer, step, t + 3, t + 4, 400),
            ("main", "cpu", "attend", layer, step, t + 4, t + 5, 500),
        ]
    out.append(("main", "cpu", "dense", 1, step, at + 5, at + 20, 0))
    out.append(("main", "cpu", "dense", 0, step, at + 25, at + 40, 0))  # to the next step: the head
    return out


def test_one_thread_does_one_thing_after_another():
    line = by_hand(*plain_step(), *plain_step(1, 40))
    layer = 1 + 4 + 2 + 6 + 3
    assert R.modelled_seconds(R.replay(line, box())) == [pytest.approx((2 * layer + 5 + 7) / 1e3)]
    assert decode_steps(line)[0].seconds == pytest.approx(0.040)


def ahead_step() -> list[tuple]:
    """The guess for layer 1 begins once layer 0's keys are in, its prefetch follows; layer 1 waits for both."""
    out = [span for span in plain_step() if not (span[2] == "read" and span[3] == 1)]
    out += [
        ("select", "cpu", "guess", 1, 0, 1, 3, 0),
        ("reader", "drive", "prefetch", 1, 0, 3, 15, 400),
        ("main", "cpu", "wait", 1, 0, 23, 24, 0),
    ]
    return out


@pytest.mark.parametrize(
    ("kinds", "ms"),
    [
        # Main: 1 + 4 + 2 + 6 + 3 = 16 for layer 0, dense 5, append to 22, score, select to 28; the prefetch, after a
        # guess from 1 to 2, waits for layer 0's read, which is ready later: it is served first, from 2 to 8. So layer
        # 0's read is from 8 to 14, one later than without: attend 17, dense 22, append 23, 27, 29, attend 32, head 39.
        ({}, 39),
        # A prefetch of 60 ms from 2: layer 0's read ends at 68, all that follows it (3 + 5 + 1 + 4 + 2 + 3 + 7) at 93.
        ({"prefetch": 60}, 93),
        # A guess of 30 ms from 1: layer 0 reads from 7 and ends at 16, dense 21; the keys of layer 1 wait until 31;
        # they are in at 32, chosen at 38, and the prefetch ends at 37: attend 41, head 48.
        ({"guess": 30}, 48),
    ],
)
def test_what_was_guessed_is_waited_for(kinds, ms):
    line = by_hand(*ahead_step(), *plain_step(1, 40))
    assert R.modelled_seconds(R.replay(line, box(**kinds)))[0] == pytest.approx(ms / 1e3)


@pytest.mark.parametrize(("prefetch", "ms"), [(6, 32), (60, 71)])
def test_a_loader_works_beside_the_layers(prefetch, ms):
    """Layer 1 reports a prefetch that began when layer 0's keys were in: from 1, at 1 + 60 the latest attend may begin.

    Layer 0 ends at 1 + 4 + 2 + 3 = 10, dense at 15, layer 1's choice at 22, attend at 25, head at 32.
    """
    spans = [span for span in plain_step() if span[2] != "read"]
    spans += [("main", "drive", "prefetch", 1, 0, 1, 15, 400), ("main", "cpu", "wait", 1, 0, 23, 24, 0)]
    line = by_hand(*spans, *plain_step(1, 40))
    assert R.modelled_seconds(R.replay(line, box(prefetch=prefetch)))[0] == pytest.approx(ms / 1e3)


def test_a_drive_that_scores_works_beside_the_host():
    spans = [span for span in plain_step() if span[2] != "read"]
    spans += [("main", "drive", "evaluate", i, 0, 20 * i + 1, 20 * i + 2, 1000) for i in range(2)]
    spans += [("main", "cpu", "merge", i, 0, 20 * i + 2, 20 * i + 3, 8) for i in range(2)]
    line = by_hand(*spans, *plain_step(1, 40))
    one = 1 + 2 + 3  # append, select, attend
    for evaluate, scored in ((3, 4), (9, 9)):
        took = R.modelled_seconds(R.replay(line, box(evaluate=evaluate, merge=1)))[0]
        assert took == pytest.approx((2 * (one + scored + 1) + 5 + 7) / 1e3)


def test_exclusive_seconds_leave_out_what_is_within():
    took = dict(zip(("append", "score", "select"), (1, 1, 1), strict=True))
    own = exclusive_seconds([Span(s[1], s[2], 0, 0, s[5] * MS, s[6] * MS) for s in plain_step()[:3]])
    assert {span.kind: ms * 1e3 for span, ms in own} == pytest.approx(took)


@pytest.mark.parametrize("waits", [(0, 6), (1, 6), (3, 6), (3, 9)])
def test_exclusive_seconds_of_a_loader_are_the_time_it_was_at_work(waits):
    """K from 0 to 5 and V from 2 to 6, at once, are 6 of work, whenever the wait for both began; what it waits beyond
    is its own.
    """
    spans = [Span("drive", "prefetch", 0, 0, 0, 5 * MS), Span("drive", "prefetch", 0, 0, 2 * MS, 6 * MS)]
    spans.append(Span("cpu", "wait", 0, 0, waits[0] * MS, waits[1] * MS))
    took = defaultdict(float)
    for span, seconds in exclusive_seconds(spans):
        took[span.kind] += seconds * 1e3
    assert dict(took) == pytest.approx({"prefetch": 6, "wait": max(0, waits[1] - 6)}, abs=1e-9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A real run of each kind, as saved and read back."""
    import torch

    from tests.conftest import FAMILIES

    torch.manual_seed(7)
    model, out = FAMILIES["llama"]().eval(), {}
    prompt = torch.randint(2, 97, (1, 150))
    folder = tmp_path_factory.mktemp("runs")
    ways = {
        "full": {},
        "topk": {},
        "hillinfer": dict(drive=folder, lookahead=False),
        "ahead": dict(drive=folder, lookahead=True),
        "emulated": dict(drive=folder, drive_kind="emulated", lookahead=False),
    }
    for name, options in ways.items():
        system = name if name in ("full", "topk") else "hillinfer"
        with hillinfer.make_cache(model, system, alpha=0.2, recent=4, **options) as cache:
            model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
            cache.timeline.about = describe(cache.run, shape_of(model.config, 4), name)
            out[name] = Timeline.load(cache.timeline.save(folder / f"{name}.json"))
    return out


WAYS = ("full", "topk", "hillinfer", "ahead", "emulated")


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_replayed_with_all_its_bytes(runs, way):
    line, profile = runs[way], find_profile("rtx4090-smartssd")
    steps = decode_steps(line)[:-1]
    want = Counter()
    for step in steps:
        for own in step.threads.values():
            for span in own:
                want[span.kind] += span.bytes
    modelled = R.replay(line, profile, most=len(steps))
    got = Counter()
    for span in modelled.spans:
        got[span.kind] += span.bytes
    extra = {"transfer"} if way != "full" else set()  # the run had no GPU to bring things to
    assert set(+got) - set(+want) <= extra
    assert {kind: got[kind] for kind in +want} == +want
    assert modelled.source == "modelled: rtx4090-smartssd" and len(R.modelled_seconds(modelled)) == len(steps)
    assert "modelled: rtx4090-smartssd" in timeline_figure(modelled).layout.xaxis.title.text
    attend = {span.lane for span in modelled.spans if span.kind == "attend"}
    assert attend == {"gpu"}


@pytest.mark.parametrize("way", WAYS)
def test_no_lane_works_more_than_it_can(runs, way):
    line = R.replay(runs[way], find_profile("rtx4090-smartssd"))
    by_lane = defaultdict(list)
    for span in line.spans:
        by_lane[span.lane, span.detail.get("part")].append(span)
    for own in by_lane.values():
        own.sort(key=lambda span: span.start_ns)
        assert all(a.end_ns <= b.start_ns for a, b in pairwise(own))


def test_lookahead_is_in_the_replay(runs):
    """The order is the run's own: what the pipeline did changes what is replayed."""
    kinds = {way: {task.kind for task in R.to_tasks(runs[way], find_profile("h200"))} for way in ("hillinfer", "ahead")}
    assert "guess" in kinds["ahead"] - kinds["hillinfer"]
    overlap = {way: R.replay(runs[way], find_profile("h200")).overlap() for way in ("hillinfer", "ahead")}
    assert overlap["ahead"] > overlap["hillinfer"]


def test_what_was_measured_is_not_looked_at(runs):
    """Three times slower in every span, the run is replayed the same: order and sizes count, durations do not."""
    profile = find_profile("h200")
    before = R.modelled_seconds(R.replay(runs["ahead"], profile))
    slow = Timeline()
    slow.about = runs["ahead"].about
    slow.spans = [replace(s, start_ns=3 * s.start_ns, end_ns=3 * s.end_ns) for s in runs["ahead"].spans]
    assert R.modelled_seconds(R.replay(slow, profile)) == before


def test_what_is_predicted_was_not_calibrated_on():
    """Neither the shape, nor a context; and sizes lie between those calibrated at, so that nothing is extrapolated."""
    from benchmarks.self_replay import MEASURED
    from hillinfer.whatif.calibrate import CONTEXTS, random_models

    small, large = (shape_of(model.config, 4) for model in random_models())
    own = SHAPES["embedded"]
    for name in ("heads", "kv_heads", "hidden", "inner", "vocab", "layers"):
        assert getattr(own, name) not in (getattr(small, name), getattr(large, name)), name
    for name in ("layer_weights", "head_weights", "record_bytes"):
        assert getattr(small, name) < getattr(own, name) < getattr(large, name), name
    assert not set(MEASURED) & set(CONTEXTS)


def total(line: Timeline, kind: str, target: R.Target) -> float:
    return sum(task.bytes for task in R.to_tasks(line, find_profile("h200"), target, most=2) if task.kind == kind)


def test_the_stated_rules_of_scaling(runs):
    line, none = runs["hillinfer"], R.Target()
    about = read_summary(line)

    def ratio(kind: str, **change) -> float:
        return total(line, kind, R.Target(**change)) / total(line, kind, none)

    twice, n = round(2 * about.cached), 2 * about.cached / about.cached
    assert ratio("score", context=twice) == pytest.approx(n, rel=0.01)
    assert ratio("read", context=twice) == pytest.approx(n, rel=0.01)
    assert ratio("append", context=twice) == 1
    for kind in ("score", "gather", "read", "attend", "append"):
        assert ratio(kind, batch=3) == 3
    share = about.attended / about.cached
    assert ratio("attend", alpha=share / 2) == pytest.approx(0.5, rel=0.01)
    assert ratio("score", alpha=share / 2) == 1
    wide = ModelShape("wide", about.shape.layers, 8, 4, 32, 64, 96, 97, width=2)
    assert ratio("score", shape=wide) == pytest.approx(4)  # twice the heads, twice the width
    assert ratio("attend", shape=wide) == pytest.approx(2)  # of half the bytes
    deep = ModelShape(**asdict(about.shape) | {"layers": 7})
    count = Counter(task.kind for task in R.to_tasks(line, find_profile("h200"), R.Target(deep), most=1))
    assert count["attend"] == count["append"] == 7 and count["dense"] == 6 and count["head"] == 1


def test_what_moves_no_bytes_on_another_machine(runs):
    """Choosing reads a score of 4 bytes for each token and KV head; this code's overhead is not known there."""
    profile, about = find_profile("h200"), read_summary(runs["topk"])
    took = {task.kind: task.seconds for task in R.to_tasks(runs["topk"], profile, most=1)}
    scores = 4 * about.cached * about.shape.kv_heads
    assert took["select"] == pytest.approx(scores / profile.gather_rate + profile.get("cpu.call"))
    assert took["other"] == 0


def test_full_attends_to_all_whatever_alpha(runs):
    assert total(runs["full"], "attend", R.Target(alpha=0.1)) == total(runs["full"], "attend", R.Target())


def test_what_memory_cannot_hold_is_read(runs):
    """The box's memory holds a small part of this KV: more is read than the recorded share, and less is gathered."""
    target = R.Target(find_shape("qwen-7b"), 131_072, 8, 0.2)
    big, small = find_profile("h200"), find_profile("rtx4090-smartssd")
    tasks = {p.name: R.to_tasks(runs["hillinfer"], p, target, most=1) for p in (big, small)}
    read = {name: sum(t.bytes for t in own if t.kind == "read") for name, own in tasks.items()}
    gathered = {name: sum(t.bytes for t in own if t.kind == "gather") for name, own in tasks.items()}
    assert read["rtx4090-smartssd"] > 1.5 * read["h200"]
    assert gathered["rtx4090-smartssd"] < gathered["h200"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", ["drive_read", "link_to_gpu", "gpu_bandwidth", "cpu_bandwidth", "scorer_dram_read"])
def test_a_faster_part_never_makes_a_step_slower(runs, way, number):
    """A recorded graph is a chain with few branches, so the anomaly of test_engine.py is small if it arises."""
    profile = find_profile("rtx4090-smartssd")
    part, name = number.split("_", 1)
    rate, last = profile.parts[part][name], None
    for factor in (0.5, 1, 2, 8):
        faster = Rate(tuple(factor * value for value in rate.values), rate.source, rate.blocks)
        line = R.replay(runs[way], profile.with_numbers("x", **{number: faster}), R.Target(SHAPES["opt-6.7b"], 8192))
        took = R.modelled_seconds(line)[-1]
        assert last is None or took <= last * 1.01
        last = took


def test_a_trace_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not say what was run"):
        read_summary(Timeline())
    line = by_hand(("main", "cpu", "append", 0, 0, 0, 1, 0))
    with pytest.raises(ValueError, match="no decode step"):
        decode_steps(line)
    (tmp_path / "x.json").write_text('{"traceEvents": []}')
    with pytest.raises(ValueError, match="not a trace of this project"):
        Timeline.load(tmp_path / "x.json")


def test_costs_are_taken_from_what_was_measured():
    """Two steps by hand: each kind's own time, without what is within it; and the main thread's gaps as `other`."""
    from hillinfer.whatif.calibrate import costs, rising, samples

    assert rising([1, 4, 1, 8]) == pytest.approx((1, 2, 2, 8)) and rising([4, 2, 1]) == pytest.approx((2, 2, 2))
    line = by_hand(*plain_step(), *plain_step(1, 40), *plain_step(2, 80))
    found = samples(line)
    assert tuple(found.loc["score"]) == pytest.approx((1000, 1e-3))
    assert tuple(found.loc["select"]) == pytest.approx((100 * SMALL.code_bytes(), 1e-3))
    assert tuple(found.loc["read"]) == pytest.approx((400, 1e-3)) and found.seconds["dense"] == pytest.approx(15e-3)
    assert found.seconds["other"] == pytest.approx(0)
    larger = by_hand(*plain_step(), *plain_step(1, 40))
    larger.about["cached"] = 200.0
    for span in larger.spans:
        span.bytes *= 3
    own = costs([line, larger], "measured: by hand")
    assert own["mine.score"].sizes == (1000, 3000) and own["score"].at(2000) == pytest.approx(1e-3)
    modelled = R.modelled_seconds(R.replay(line, Profile("hand", "", box().parts, own)))
    assert modelled == pytest.approx([0.040, 0.040], rel=1e-4)  # what was measured
