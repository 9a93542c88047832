"""The accuracy board without a browser: the same files as `hillinfer eval`, stopped, resumed, watched and read."""

import shlex
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hillinfer import UsageError
from hillinfer.commands.app import app
from hillinfer.longbench import report
from hillinfer.longbench.plan import Evaluation, settings_of
from hillinfer.longbench.results import KEY, read, read_manifest
from hillinfer.workbench.evalrun import EvalRun, Watched
from hillinfer.workbench.scores import answers_of, parting, pieces_of, score_rows
from tests.longbench_rows import write_model, write_rows

accuracy = pytest.importorskip("hillinfer.workbench.accuracy", reason="pip install 'hillinfer[lab]'")
for library in ("datasets", "rapidfuzz"):
    pytest.importorskip(library, reason="pip install 'hillinfer[longbench]'")


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hillinfer")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    write_rows(folder / "rows", ["hotpotqa", "passage_count"], words=100)
    write_model(folder / "model", ends=20)
    return folder


def made_for(place, folder):
    made = accuracy.AccuracyBoard(folder)
    made.model.value, made.data.value, made.origin.value = str(place / "model"), str(place / "rows"), "LongBench"
    made.tasks.value, made.systems.value = ["hotpotqa", "passage_count"], ["topk", "streaming"]
    made.alphas.value, made.samples.value, made.question.value = "0.1 0.3", 2, "prefilled"
    made.show()
    return made


@pytest.fixture
def board(place, tmp_path):
    made = made_for(place, tmp_path / "results")
    yield made
    made.close()


@pytest.fixture(scope="module")
def done(place):
    """A board after its run; tests only look at it."""
    made = made_for(place, place / "done")
    made.run()
    yield made
    made.close()


def keys(rows) -> list[tuple]:
    return [tuple(row[name] for name in KEY) for row in rows]


def test_the_board_writes_what_eval_writes(done, tmp_path):
    board, rows = done, done.rows
    assert len(rows) == 2 * 2 * 5 and board.table.state["phase"] == "done" and ours() == []
    words = [tmp_path / "other" if str(word) == str(board.folder.value) else word for word in board.command()[1:]]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    other = read(tmp_path / "other")
    said, same = ({key: row["pred"] for key, row in zip(keys(r), r, strict=True)} for r in (rows, other))
    assert said == same
    first, second = (read_manifest(folder)["settings"] for folder in (Path(board.folder.value), tmp_path / "other"))
    assert first == second and settings_of(first).identity() == first
    assert CliRunner().invoke(app, [str(word) for word in board.command()[1:]]).exit_code == 0  # and continues it
    assert len(read(Path(board.folder.value))) == len(rows)


def test_the_table_has_the_figures_of_the_report(done):
    board, rows = done, done.rows
    frame = report.frame_of(rows)
    table, cost = report.scores(frame), report.costs(frame)
    assert [row["system"] for row in board.table.rows] == ["full", "topk", "topk", "streaming", "streaming"]
    for row in board.table.rows:
        own = table[(table.system == row["system"]) & (table.alpha == row["alpha"])].set_index("task")
        assert row["tasks"] == {task: own.score[task] for task in ("hotpotqa", "passage_count")}
        assert row["score"] == own.score["average"] and row["low"] == own.low["average"]
        paid = cost[(cost.system == row["system"]) & (cost.alpha == row["alpha"])].iloc[0]
        assert row["ms"] == pytest.approx(paid.ms_per_token) and row["ms"] > 0 and row["kl"] is not None
        assert row["n"] == row["planned"] == 4
    assert board.table.rows[0]["diff"] is None and board.table.rows[1]["diff"] is not None
    page = board.table.html("a <title>")
    assert "a &lt;title&gt;" in page and "streaming" in page and "http" not in page.replace("http://www.w3.org", "")


def test_stopped_then_resumed_by_another_board_nothing_is_repeated(board, monkeypatch):
    run = board.start()
    until = time.monotonic() + 60
    while len(run.rows) < 3:
        assert time.monotonic() < until
        time.sleep(0.005)
    board.stop()
    assert run.join(30) and run.phase == "stopped" and ours() in ([], ["hillinfer-painter"])
    kept = read(Path(board.folder.value))
    assert 3 <= len(kept) < 20
    board.close()
    assert board.table.state["phase"] == "stopped"
    again = accuracy.AccuracyBoard(board.folder.value)  # as after a restart of the kernel: only the folder is known
    assert again.table.state["phase"] == "kept" and len(again.table.rows) > 0
    for name in ("model", "data", "question"):
        assert getattr(again, name).value == getattr(board, name).value
    again.tasks.value, again.systems.value = board.tasks.value, board.systems.value
    again.alphas.value, again.samples.value = board.alphas.value, board.samples.value
    rows = again.run()
    assert rows[: len(kept)] == kept and len(set(keys(rows))) == len(rows) == 20
    assert again.table.state["kept"] == len(kept)
    again.systems.value = [*again.systems.value, "quest"]  # a system is added later
    assert len(again.run()) == 28 and again.table.state["kept"] == 20


def test_what_cannot_run_is_one_line(board):
    board.alphas.value = "much"
    assert board.start() is None and "are no numbers" in board.table.state["error"]
    board.alphas.value, board.model.value = "0.1", "/nowhere/at/all"
    board.run_button.click()
    board.runner.join()
    board._join()
    assert "cannot load model" in board.table.state["error"] and board.table.state["phase"] == "failed"
    assert not board.run_button.disabled and ours() == []
    with pytest.raises(UsageError, match="cannot load"):
        board.run()


def test_an_eval_of_another_process_is_watched(board, place):
    other = accuracy.AccuracyBoard(board.folder.value)
    other.watch()
    evaluation = board.evaluation()
    EvalRun(evaluation, shlex.split("hillinfer eval")).start().result()
    until = time.monotonic() + 20
    while sum(row["n"] for row in other.table.rows) < 20:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert other.table.state["phase"] == "watching"
    other.table.cell = {"task": "hotpotqa", "sample": 0}
    assert len(other.table.answers["answers"]) == 5
    other.watch(False)
    assert ours() == []
    watched = Watched(Path(board.folder.value))
    assert watched.poll() and not watched.poll() and len(watched.rows) == 20
    assert not Watched(place / "nothing").poll()


def test_a_folder_in_use_says_so(board):
    with Evaluation(Path(board.folder.value), tasks=["lines_1k"], samples=1).opened([]):
        run = board.start()
        run.join()
    board._join()
    assert "another eval is writing" in board.table.state["error"]


def test_answers_side_by_side_and_where_they_part(done):
    board, rows = done, done.rows
    board.table.cell = {"task": "hotpotqa", "system": "topk", "alpha": 0.1, "sample": 1}
    about = board.table.answers
    assert about["number"] == 1 and about["of"] == 2 and about["unit"] == "token"
    assert about["input"].startswith("Question") and about["reference"] == ["the old mill"]
    preds = {(r["system"], r["alpha"]): r["pred"] for r in rows if (r["task"], r["id"]) == ("hotpotqa", about["id"])}
    assert len(about["answers"]) == 5
    for one in about["answers"]:
        assert one["same"] + one["token"] + one["rest"] == preds[one["system"], one["alpha"]]
        assert preds["full", None].startswith(one["same"])
        assert (one["parts"] is None) == (preds[one["system"], one["alpha"]] == preds["full", None])
    assert any(one["parts"] is not None for one in about["answers"])
    board.table.cell = {}
    assert board.table.answers == {}


def test_a_token_is_opened_in_the_dashboard(done):
    board = done
    board.table.cell = {"task": "hotpotqa", "system": "streaming", "alpha": 0.1, "sample": 0}
    answers = board.table.answers["answers"]
    index = next(i for i, one in enumerate(answers) if one["system"] == "streaming" and one["parts"] is not None)
    board._on_message(None, {"kind": "open", "index": index}, [])
    workbench, one = board.workbench, answers[index]
    run = workbench.runs[-1]
    assert run.result() == (one["same"] + one["token"] + one["rest"]).strip()
    workbench.join_painter()
    assert workbench.task.value == "hotpotqa" and workbench.system.value == "streaming" and board._below.children
    step = workbench._boards[-1].cursor["step"]
    [marked] = [token for token in run.tokens if token.step == step and not token.asked]
    before = "".join(t.text for t in run.tokens if not t.asked and t.step < step)
    assert len(before) <= len(one["same"]) < len(before) + len(marked.text)


def test_parting():
    pieces = pieces_of(None)
    assert pieces("a bc  d ") == ["a", " bc", "  d", " "]
    assert parting(["a", "b"], ["a", "c"]) == 1 and parting(["a"], ["a"]) is None and parting(["a"], ["a", "b"]) == 1
    row = dict(model="m", question="stepwise", task="t", id="1", answers=["x"], length=1, prompt_tokens=3, new_tokens=1)
    some = [row | dict(system="topk", alpha=0.1, pred=None, score=None)]
    assert answers_of(some, "t", "1", None)["answers"][0]["compared"] is False
    assert score_rows([]) == []
