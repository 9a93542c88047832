"""Decode steps modelled by rules, sweeps over them, and the papers' claims."""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks import papers
from hillinfer import UsageError
from hillinfer.commands.app import app
from hillinfer.systems.hillinfer.profile import Profile, Rate
from hillinfer.systems.shapes import SHAPES
from hillinfer.whatif import costs, sweep
from hillinfer.whatif.devices import find_profile
from hillinfer.whatif.engine import schedule
from hillinfer.whatif.modelled import model, seconds, timeline
from hillinfer.whatif.rules import RULES
from hillinfer.whatif.scenario import DoesNotFit, Scenario

SMART = find_profile("rtx4090-smartssd")
SHAPE = SHAPES["llama-3.1-8b"]
GIB = 1 << 30


def case(context=16_384, batch=4, host=2 * GIB, profile=SMART, **more) -> Scenario:
    return Scenario(profile, SHAPE, context, batch, host=host, **more)


def tasks_of(name: str, own: Scenario):
    try:
        return model(own, name)
    except DoesNotFit:
        return model(Scenario(own.profile, own.shape, own.context, own.batch), name)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_its_bytes_and_its_lanes(name):
    tasks, traffic = tasks_of(name, case())
    times, lanes, moved = schedule(tasks), defaultdict(list), defaultdict(float)
    for task, time in zip(tasks, times, strict=True):
        lanes[task.lane].append(time)
        moved[task.kind, task.step] += task.bytes
    for own in lanes.values():
        own.sort()
        assert all(a[1] <= b[0] + 1e-12 for a, b in pairwise(own))
    layers = SHAPE.layers
    assert moved["attend", 2] == pytest.approx((traffic.attend + traffic.near) * layers, rel=1e-3)
    read = moved["read", 2] + moved["mapped", 2] + moved["prefetch", 2]
    least = (traffic.stream + traffic.keys + traffic.fetched) * layers
    assert least * 0.999 <= read <= 2 * least + 1
    sent = traffic.stream + traffic.resident + traffic.fetched + traffic.gather
    assert moved["transfer", 2] <= sent * layers * 1.001
    assert moved["dense", 2] == layers * SHAPE.layer_weights * SHAPE.width


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("number", ["drive_read", "drive_mapped", "link_to_gpu", "gpu_bandwidth", "scorer_nand_read"])
def test_a_faster_part_never_makes_a_step_slower(name, number):
    part, key = number.split("_", 1)
    rate, last = SMART.parts[part][key], None
    for factor in (0.5, 1, 2, 8):
        faster = Rate(tuple(factor * value for value in rate.values), rate.source, rate.blocks)
        own = case(profile=SMART.with_numbers("x", **{number: faster}))
        tasks, _ = tasks_of(name, own)
        times = schedule(tasks)
        took = max(end for _, end in times)
        # The pool's balance may move with the speeds, and a lane serves who comes first: a hundredth is allowed.
        assert last is None or took <= last * 1.01, (factor, took, last)
        last = took


@pytest.mark.parametrize("name", RULES)
def test_more_context_never_makes_a_step_shorter(name):
    last = 0.0
    for context in (2048, 8192, 32_768):
        try:
            took = seconds(case(context, host=None), name)
        except DoesNotFit:
            break
        assert took >= last * 0.999
        last = took
    assert last


def test_a_step_solved_by_hand():
    """All KV on the GPU, one layer: its weights, its KV and the head, each read once at 1,008 GB/s."""
    shape = replace(SHAPE, layers=1)
    own = Scenario(SMART, shape, 4096, 1)
    took = (shape.layer_weights * 2 + own.layer + shape.head_weights * 2) / 1.008e12
    calls = (12 + 1 + 1) * 5e-6
    append = 4096 / 45e9 + 20e-6  # the new token's record, gathered at half of 90 GB/s
    assert seconds(own, "full") == pytest.approx(took + calls + append, rel=1e-9)


def test_a_query_that_goes_to_the_records_solved_by_hand():
    """One layer, all KV in host memory: what crosses, the wait, thread starts and Python are tasks of their own."""
    shape, profile = replace(SHAPE, layers=1), find_profile("rtx4090-gen4-nvme")
    own = Scenario(profile, shape, 32_768, 1, 0.1)
    tasks = [task for task in model(own, "hillinfer-near-host")[0] if task.step == 2]
    took = {task.kind: task.seconds for task in tasks}
    assert took["query"] == pytest.approx((4096 * 2 + 4096) / profile.get("link.from_gpu") + 10e-6)
    assert took["output"] == pytest.approx(4096 * 2 / profile.get("link.to_gpu") + 10e-6)
    assert took["attend"] == pytest.approx(own.selected / 70e9 + 20e-6)
    assert (took["synchronize"], took["python"]) == (14e-6, 0.5e-3)
    assert [task.seconds for task in tasks if task.kind == "threads"] == [100e-6] * 2
    assert seconds(own, "hillinfer-near-host") == pytest.approx(sum(task.seconds for task in tasks))


def test_codes_in_gpu_memory_solved_by_hand():
    """Positions cross with the query, the host's Python is half, and what does not fit is scored on the host."""
    shape, profile = replace(SHAPE, layers=1), find_profile("rtx4090-gen4-nvme")
    own = Scenario(profile, shape, 32_768, 1, 0.1)
    took = {task.kind: task.seconds for task in model(own, "hillinfer-near")[0] if task.step == 2}
    moved = (5 + 10) * own.codes + 100 * 32 * 32_768  # codes of one layer, and the scores of 32 heads
    assert took["score"] == pytest.approx(moved / 1.008e12 + 75 * 5e-6)
    crossed = 4096 * 2 + 4096 + 8 * 3277
    assert took["query"] == pytest.approx(crossed / profile.get("link.from_gpu") + 10e-6)
    assert took["python"] == 0.25e-3 and "select" not in took
    assert seconds(own, "hillinfer-near") < seconds(own, "hillinfer-near-host")
    much = replace(own, context=1 << 25)
    assert seconds(much, "hillinfer-near") == seconds(much, "hillinfer-near-host")


def test_streaming_everything_is_bound_by_the_drive():
    own = case(32_768, 8, 0)
    assert seconds(own, "flexgen") == pytest.approx(own.kv / 3.2e9, rel=0.02)


def test_without_a_gpu_nothing_is_gathered():
    """The kernel attends to the pool's records where they lie; with a GPU they are first put side by side."""
    own = {name: SMART.parts[name] for name in ("cpu", "drive")}
    bare = Profile("no gpu", "a test", own)
    call = bare.get("cpu.call")
    assert costs.seconds(bare, "cpu", "gather", 1e9) == call
    assert costs.seconds(SMART, "cpu", "gather", 1e9) == pytest.approx(1e9 / SMART.gather_rate + call)


def test_where_everything_fits_the_paths_are_equal():
    own = case(4096, 1, None)
    took = [seconds(own, name) for name in ("dualblade", "page-cache", "flexgen-held")]
    assert took == pytest.approx([took[0]] * 3)


def test_what_does_not_fit_says_so():
    with pytest.raises(DoesNotFit, match=r"GB of KV in .* of memory"):
        seconds(case(131_072, 32), "full")
    with pytest.raises(DoesNotFit, match="no drive that computes"):
        seconds(case(profile=find_profile("h200")), "instattention")


def test_the_pool_is_what_a_run_would_hold():
    own = case()
    assert own.pool() == int(2 * GIB) // (SHAPE.layers * 4 * SHAPE.record_bytes) / own.context
    paper = case(host=None, split="paper").pool()
    assert 0 < paper < 1  # the closed form leaves some to the drive although all would fit


def test_a_modelled_timeline_is_marked():
    line = timeline(case(), "hillinfer")
    assert line.source == "modelled: rtx4090-smartssd" and line.about["system"] == "hillinfer"
    assert {span.lane for span in line.spans} == {"gpu", "cpu", "drive", "link"}


def test_sizes():
    assert sweep.parse_sizes("4k..32k") == [4096, 8192, 16384, 32768]
    assert sweep.parse_sizes("1,8, 2K") == [1, 8, 2048]
    for bad in ("", "0", "4g", "8k..4k", "1..", "-1"):
        with pytest.raises(UsageError):
            sweep.parse_sizes(bad)


def some(count: int = 24) -> list[sweep.Cell]:
    names = ["rtx4090-smartssd", "rtx4090-gen4-nvme"]
    return sweep.cells(names, ["llama-3.1-8b"], ["all"], [4096, 131_072], [1, 16])[:count]


def test_a_sweep_keeps_the_order_and_says_what_does_not_fit():
    seen = []
    frame = sweep.sweep(some(), jobs=1, done=seen.append)
    assert frame.system.tolist() == [cell.system for cell in some()] and seen[-1] == 24
    fits = frame[frame.ms.notna()]
    assert (fits.note == "modelled: " + fits.profile).all() and (fits.ms > 0).all()
    assert frame[frame.ms.isna()].note.str.startswith("does not fit").all()
    assert {"gpu", "link", "drive"} & set(frame.bound)
    pd.testing.assert_frame_equal(sweep.sweep(some(), jobs=2), frame)


def command(*words):
    return CliRunner().invoke(app, ["replay", *map(str, words)])


def test_the_command_writes_a_table_a_plot_and_a_trace(tmp_path):
    result = command("--context", "4k,8k", "--batch", 1, "--systems", "full,hillinfer", "--jobs", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "modelled on rtx4090-smartssd" in result.output
    assert len(pd.read_csv(tmp_path / "replay.csv")) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"replay.csv", "report.html", "timeline.json"}
    assert "ms per step (modelled)" in (tmp_path / "report.html").read_text()


def test_the_command_replays_a_recorded_run(tmp_path):
    prompt, trace = tmp_path / "prompt.txt", tmp_path / "trace.json"
    prompt.write_text("line a-b: REGISTER_CONTENT is <12345>\n" * 20)
    words = ["--model", "embedded", "--prompt-file", prompt, "--system", "topk", "--max-new-tokens", 4]
    result = CliRunner().invoke(app, ["run", *map(str, words), "--trace", str(trace)])
    assert result.exit_code == 0, result.output
    result = command("--run", trace, "--context", "4k", "--batch", "1,2", "--jobs", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(tmp_path / "out" / "replay.csv")
    assert frame.system.tolist() == ["recorded"] * 2 and (frame.ms > 0).all()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--profile", "rtx9090"], "no profile 'rtx9090'"),
        (["--model-shape", "gpt-5"], "no model shape 'gpt-5'"),
        (["--systems", "mine"], "no rule for a system 'mine'"),
        (["--context", "big"], "'big' is not a size"),
        (["--alpha", "2"], "alpha is 2.0"),
        (["--alpha", "x"], "'x' is not a list of numbers"),
        (["--host-budget", "much"], "'much' is not an amount of memory"),
        (["--systems", "recorded"], "name its trace with --run"),
        (["--jobs", "0"], "no sweep with 0 jobs"),
        (["--run", "nowhere.json"], "hillinfer run ... --trace nowhere.json"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, words, says):
    result = command(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_claims_are_stated_with_verdict_and_reason():
    frame = papers.headlines()
    assert set(frame.verdict) <= {"reached", "not reached"}
    assert (frame.why.str.len() > 30).all() and frame.profile.str.startswith("modelled: ").all()
    assert ((frame.ours >= frame.paper) == (frame.verdict == "reached")).all()


def test_the_minimum_is_where_each_form_predicts():
    frame = papers.balance()
    assert frame.share[frame.paper.idxmin()] == pytest.approx(frame.predicted[0], abs=0.03)
    assert frame.share[frame.barrier.idxmin()] == pytest.approx(frame.own[0], abs=0.03)


def test_a_computational_drive_wins_only_where_its_dram_holds_the_codes():
    frame = papers.awkward_truth()
    scanned = frame[frame.winner != "none"]
    fits = scanned["codes GiB"] * GIB <= SMART.get("scorer.memory")
    assert (scanned.winner[fits] == "card, codes in DRAM").all() and fits.any()
    assert (scanned.winner[~fits] == "Gen4, codes to host").all() and (~fits).any()
    assert (scanned["Gen4, keys to host"] < 0.6 * scanned["card, keys on NAND"]).all()


def test_the_page_cache_collapses_and_nothing_is_gained_when_all_fits():
    frame = papers.page_cache_collapse((2, 6, 11))
    assert frame.hit.tolist() == [0, 0, 1]
    assert (frame.dual <= frame[["page cache", "direct"]].min(axis=1) * (1 + 1e-9)).all()
    assert frame.cut.iloc[-1] == 0 and math.isclose(frame["page cache"].iloc[-1], frame.dual.iloc[-1])
