"""Runs in threads, the board's messages, and the dashboard without a browser."""

import gzip
import json
import threading
import time

import numpy as np
import pytest

from hillinfer import UsageError
from hillinfer.assets import load_embedded
from hillinfer.longbench.runner import ask, feed
from hillinfer.speculative import describe_rounds
from hillinfer.systems.registry import make_cache
from hillinfer.workbench.cases import TEXT, Case
from hillinfer.workbench.differences import compare_figures, differences, first_difference
from hillinfer.workbench.live import LiveRun, _Growing
from hillinfer.workbench.observe import AttentionRecord


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


@pytest.fixture(scope="module")
def case(embedded):
    return Case.task(embedded[1], "two_hop", 1024, 1)


@pytest.fixture(scope="module")
def ended(embedded, case, tmp_path_factory):
    """A run that went to its end."""
    options = dict(alpha=0.2, drive=tmp_path_factory.mktemp("drive"))
    run = LiveRun(*embedded, case, "hillinfer", options, AttentionRecord())
    run.start().result()
    return run


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hillinfer")]


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_store_has_what_an_earlier_run_prefilled(embedded, case, ended, tmp_path):
    """Chunk by chunk at first, at once after that; the answer stays the same."""
    options = dict(alpha=0.2, drive=tmp_path)
    asked, known = len(case.context), (len(case.context) - 2) // 256 * 256
    for opened in (0, known):
        run = LiveRun(*embedded, case, "hillinfer", options, store=tmp_path / "kv").start()
        assert run.result() == ended.answer
        assert f"{opened:,} of {asked:,} prompt tokens came from the store" in run.status()["notes"]


def test_a_live_run_answers_as_the_runner_does(embedded, case, ended, tmp_path):
    model, tokenizer = embedded
    with make_cache(model, "hillinfer", alpha=0.2, drive=tmp_path) as cache:
        answer = ask(model, tokenizer, case.record, cache)
    assert ended.answer == answer.text and ended.phase == "done" and ended.right is not None
    assert ended.figures["attended"] == answer.attended and ended.figures["steps"] == answer.steps
    assert len(ended.tokens) == answer.steps == len(ended.record.steps)
    assert [token.step for token in ended.tokens] == sorted(ended.record.steps)
    assert ended.status()["speed"] > 0 and ours() == []


def test_a_live_run_decodes_exactly(embedded, case, tmp_path):
    ways = ("full", {}, False), ("hillinfer", dict(alpha=0.1, drive=tmp_path), True)
    full, exact = (LiveRun(*embedded, case, system, options, exact=way).start() for system, options, way in ways)
    assert exact.result() == full.result()
    assert exact.status()["notes"] == describe_rounds(exact.counters.rounds) != "" == full.status()["notes"]
    with pytest.raises(UsageError, match="no exact decoding"):
        LiveRun(*embedded, case, "full", {}, exact=True).start()


@pytest.mark.parametrize("when", ["prefill", "question", "answer"])
def test_stop_ends_within_one_token(embedded, tmp_path, when):
    case = Case.task(embedded[1], "chain", 4096 if when == "prefill" else 1024, 2)
    run = LiveRun(*embedded, case, "hillinfer", dict(alpha=0.2, drive=tmp_path)).start()
    asked = len(case.question)
    wait_for(
        lambda: len(run.tokens) > {"question": 3, "answer": asked + 5}[when] if when != "prefill" else run.prefilled
    )
    run.stop()
    at = len(run.tokens)
    assert run.join(60) and run.phase == "stopped"
    assert len(run.tokens) <= at + 1 and len(run.tokens) < asked + case.max_new_tokens - 1
    assert run.right is None and ours() == [] and not list(tmp_path.iterdir())


def test_what_a_run_raises_is_kept_and_raised_again(embedded, case, monkeypatch):
    run = LiveRun(*embedded, case, "topk", dict(alpha=0.2))
    monkeypatch.setattr("hillinfer.workbench.live.measured", lambda *_: 1 / 0)
    run.start().join()
    assert run.phase == "failed" and "division" in run.status()["error"]
    with pytest.raises(ZeroDivisionError):
        run.result()
    assert ours() == [] and embedded[0].config._attn_implementation != "hillinfer"


def test_own_text(embedded):
    asked = Case.text(embedded[1], "line red-fox: number 1\n" * 20, "Which number?", 4)
    assert asked.question and asked.record is None
    run = LiveRun(*embedded, asked, "full", dict(alpha=1.0))
    assert isinstance(run.start().result(), str) and run.right is None
    going_on = Case.text(embedded[1], "line red-fox: number 1\n" * 20, "", 4)
    assert len(going_on.question) == 1
    with pytest.raises(UsageError, match="no text"):
        Case.text(embedded[1], " ", "", 4)


def test_what_cannot_run_is_refused_before_it_starts(embedded, models, case, tmp_path):
    with pytest.raises(UsageError, match="window of 8,192"):
        LiveRun(*embedded, Case("long", [5] * 9000, [5], 4), "full", {}).start()
    with pytest.raises(UsageError, match="drive"):
        LiveRun(*embedded, case, "hillinfer", {}).start()
    short = Case("short", [5] * 90, [5], 4)
    for model, system in ((embedded[0], "h2o"), (models("qwen2-mixed"), "topk")):
        with pytest.raises(UsageError, match="prefill again"):
            LiveRun(model, embedded[1], short, system, {}, session=tmp_path / "document.kv").start()
    assert ours() == [] and not list(tmp_path.iterdir())


def test_differences_are_those_of_the_figures(ended):
    rows = {name: (one, other) for name, one, other, _ in compare_figures(ended, ended)}
    assert rows["decode steps"] == (ended.figures["steps"],) * 2
    assert sum(rows[f"served by {tier}"][0] for tier in ("device", "host", "drive")) == pytest.approx(1)
    assert "identical, token for token" in differences(ended, ended)
    assert first_difference(ended, ended).endswith("token for token")


def test_a_session_takes_the_place_of_the_prefill(embedded, case, ended, tmp_path, monkeypatch):
    options, kept = dict(alpha=0.2, drive=tmp_path), tmp_path / "document.kv"
    first = LiveRun(*embedded, case, "hillinfer", options, session=kept)
    assert first.start().result() == ended.answer and kept.stat().st_mode & 0o777 == 0o600
    other = LiveRun(*embedded, Case.text(embedded[1], "something else", "", 4), "hillinfer", options, session=kept)
    with pytest.raises(UsageError, match="another document"):
        other.start()
    fed = []
    monkeypatch.setattr("hillinfer.workbench.live.feed", lambda *args: fed.append(len(args[2])) or feed(*args))
    again = LiveRun(*embedded, case, "hillinfer", options, session=kept)
    assert again.start().result() == ended.answer and set(fed) == {1}


# What follows needs the widgets.


@pytest.fixture
def board_of():
    pytest.importorskip("anywidget", reason="pip install 'hillinfer[lab]'")
    from hillinfer.workbench.board import Board

    def make(source, **more):
        board = Board(None, **more)
        board.sent = []
        board.send = lambda content, buffers=(): board.sent.append((content, [bytes(part) for part in buffers]))
        board.show_run(source)
        return board

    return make


TYPES = [np.float64, np.float64, np.float64, np.uint8, np.uint8, np.int16, np.int32, np.uint8, np.int32]


def columns(messages) -> list[np.ndarray]:
    parts = [[np.frombuffer(raw, kind) for raw, kind in zip(raws, TYPES, strict=True)] for _, raws in messages]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def test_rows_arrive_whole_and_once(board_of, ended, monkeypatch):
    monkeypatch.setattr("hillinfer.workbench.board.BATCH", 100)
    board = board_of(ended)
    start, took, nbytes, *_, hits = columns(board.sent)
    spans = ended.timeline.spans
    origin = min(span.start_ns for span in spans[:100])
    np.testing.assert_allclose(start, [(span.start_ns - origin) / 1e6 for span in spans])
    np.testing.assert_allclose(took, [(span.end_ns - span.start_ns) / 1e6 for span in spans])
    assert nbytes.tolist() == [span.bytes for span in spans]
    rows = hits.reshape(-1, 8)
    assert rows[:, 3:6].sum() == sum(row.device + row.host + row.drive for row in ended.counters.rows)
    assert sum(len(content["tokens"]) for content, _ in board.sent) == len(ended.tokens)
    sent = len(board.sent)
    board.flush()
    assert len(board.sent) == sent  # nothing new
    board._on_message(None, {"kind": "have", "run": board._run, "have": {"spans": 50, "hits": 0, "tokens": 2}}, [])
    assert board.sent[sent][0]["from"] == {"spans": 50, "hits": 0, "tokens": 2}
    assert len(columns(board.sent[sent:])[0]) == len(spans) - 50
    sent = len(board.sent)
    board._on_message(None, {"kind": "have", "run": None, "have": {"spans": 0, "hits": 0, "tokens": 0}}, [])
    assert len(columns(board.sent[sent:])[0]) == len(spans)  # a page that was loaded anew


def test_the_cursor_is_answered_with_that_head(board_of, ended):
    board = board_of(ended)
    step = sorted(ended.record.steps)[3]
    board.cursor = {"step": step, "layer": 2, "head": 5}
    shown, seen = board.detail["distribution"], ended.record.steps[step][2]
    assert (shown["step"], shown["layer"], shown["head"]) == (step, 2, 5)
    np.testing.assert_allclose(shown["mass"], seen.mass[5], atol=1e-3)
    assert sum(shown["chosen"]) == seen.chosen.sum()
    assert np.array(board.detail["heat"]["needed"]).shape == (6, 8)


def test_exports(board_of, ended):
    board = board_of(ended)
    board._on_message(None, {"kind": "export", "what": "trace"}, [])
    content, [data] = board.sent[-1]
    events = json.loads(gzip.decompress(data))["traceEvents"]
    assert content["kind"] == "file" and sum(event["ph"] == "X" for event in events) == len(ended.timeline.spans)
    ended.tokens[0] = ended.tokens[0]._replace(text="</script><b>")
    page = board.html("a <title>")
    assert "</script><b>" not in page and "a &lt;title&gt;" in page and page.count("</script>") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://ui.perfetto.dev", "")


def test_modelled_spans_are_marked(board_of):
    from hillinfer.timeline import Timeline
    from hillinfer.workbench.board import show_timeline

    timeline = Timeline()
    timeline.add("drive", "read", 0, 0, 0, 10)
    timeline.add("drive", "read", 0, 0, 10, 20, modelled="rtx4090.toml")
    assert show_timeline(timeline)._columns(timeline.spans)[-1].tolist() == [0, 1]
    with pytest.raises(UsageError, match="no view"):
        board_of(None, parts=["tea"])


@pytest.mark.parametrize("text", ["港口有一盏红灯。", "a 🦊🐢 b", "naïve café\n\nline  two", "half \ufffd!"])
def test_the_text_of_tokens_that_come_one_by_one_is_that_of_all(embedded, text):
    tokenizer = embedded[1]
    ids, growing = tokenizer(text, add_special_tokens=False).input_ids, _Growing(tokenizer, special=False)
    parts = [growing.add(token, number == len(ids)) for number, token in enumerate(ids, 1)]
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len([part for part in parts if "\ufffd" in part]) == text.count("\ufffd")


def test_a_character_that_never_ends_is_not_lost(embedded):
    tokenizer = embedded[1]
    first = tokenizer("🦊", add_special_tokens=False).input_ids[0]
    assert "\ufffd" in _Growing(tokenizer, special=False).add(first, last=True)
    held = _Growing(tokenizer, special=False)
    assert held.add(first) == "" and "\ufffd" in held.add(tokenizer.eos_token_id)


@pytest.mark.parametrize("asked", [dict(num_beams=4), dict(num_beams=2, num_return_sequences=2)])
def test_a_run_is_greedy_whatever_the_model_prefers(embedded, ended, monkeypatch, asked):
    for name, value in asked.items():
        monkeypatch.setattr(embedded[0].generation_config, name, value)
    assert LiveRun(*embedded, ended.case, "topk", dict(alpha=1.0)).start().result()


def test_a_run_that_ends_leaves_another_one_on_its_model_alone(embedded, monkeypatch):
    monkeypatch.setattr(embedded[0].generation_config, "eos_token_id", None)
    text = "line red-fox: REGISTER_CONTENT is <12345>\n" * 20
    short, long = (LiveRun(*embedded, Case.text(embedded[1], text, "", n), "topk", dict(alpha=1.0)) for n in (8, 60))
    short.start()
    wait_for(lambda: short.tokens)
    long.start()
    short.join()
    assert long.result() and (short.phase, long.phase) == ("done", "done")


@pytest.fixture
def workbench(embedded, tmp_path):
    pytest.importorskip("anywidget", reason="pip install 'hillinfer[lab]'")
    from hillinfer.workbench import Workbench

    made = Workbench(*embedded, drive=tmp_path)
    made.task.value, made.tokens.value = "two_hop", 1024
    made.show()
    yield made
    made.close()


def test_the_dashboard_runs_compares_and_ends(workbench, case):
    workbench.system.value = "full"
    assert workbench.run() and workbench.runs[0].phase == "done"
    workbench.system.value = "streaming"
    workbench.compare_button.click()
    wait_for(lambda: not workbench.alive)
    workbench.close()
    assert [run.system for run in workbench.runs] == ["full", "streaming"]
    assert "full, alpha" in workbench.compared.table.value and "streaming, alpha" in workbench.compared.table.value
    assert [board.state["phase"] for board in workbench._boards] == ["done", "done"]  # the last state was sent
    assert [board._sent["spans"] for board in workbench._boards] == [len(r.timeline.spans) for r in workbench.runs]
    assert ours() == [] and not workbench.run_button.disabled and workbench.stop_button.disabled
    below = workbench.compared
    assert list(below.chart.runs) == ["full, alpha 0.2", "streaming, alpha 0.2"]
    below.button.value = True  # the attention map, of the last run
    assert below.view in below.box.children and below.view.map is workbench.runs[1].record.map
    assert below.view.state["setting"].endswith("attention over the selected tokens")
    assert workbench.run() and list(below.chart.runs) == ["streaming, alpha 0.2"]
    assert below.view.map is workbench.runs[0].record.map
    workbench.attention.value = "off"
    assert workbench.run() and below.button.disabled and below.view not in below.box.children


def test_one_run_at_a_time_and_showing_again_ends_it(workbench, embedded, tmp_path, monkeypatch):
    from hillinfer.workbench import Workbench

    monkeypatch.setattr("hillinfer.workbench.dashboard.current_cell", lambda: "a cell")
    workbench.show()
    workbench.task.value = "chain"
    workbench.run_button.click()
    first = workbench.runs[0]
    workbench.run_button.click()
    assert "in progress" in workbench.message.value and workbench.runs == [first]
    other = Workbench(*embedded, drive=tmp_path)
    other.show()
    assert first.phase == "stopped" and ours() == []


def test_boards_without_cell_ids_leave_each_other_alone(workbench, embedded, tmp_path):
    from hillinfer.workbench import Workbench

    workbench.task.value = "chain"
    run = workbench.start()
    Workbench(*embedded, drive=tmp_path).show()
    assert run.result() and run.phase == "done"


def test_bad_settings_are_one_line(workbench):
    workbench.budget.value = "much"
    workbench.run_button.click()
    assert "is not an amount of memory" in workbench.message.value and not workbench.runs and ours() == []
    workbench.budget.value = ""
    workbench.origin.value = TEXT
    workbench.run_button.click()
    assert "no text" in workbench.message.value


def test_a_new_policy_is_in_the_selector(embedded, monkeypatch):
    pytest.importorskip("anywidget", reason="pip install 'hillinfer[lab]'")
    from hillinfer import POLICIES, Policy
    from hillinfer.workbench import Workbench

    monkeypatch.setitem(POLICIES, "mine", type("Mine", (Policy,), {"__doc__": "Mine."}))
    assert "mine" in Workbench(*embedded).system.options
