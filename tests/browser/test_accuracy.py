"""The accuracy board and LongBench's rows in a real JupyterLab and a real Chromium."""

import json
import os

import pytest

from tests.browser.lab import CHROMIUM, Notebook, chromium, serve
from tests.browser.test_first_notebook import SHOTS
from tests.longbench_rows import write_rows

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
BOARD = """
from hillinfer.workbench import AccuracyBoard
board = AccuracyBoard("results")
board.show()
"""
ASKED = """
board.tasks.value, board.systems.value = ["lines_1k", "two_hop_1k"], ["streaming", "topk", "hillinfer"]
board.alphas.value, board.samples.value = "0.05, 0.2", 4
"""
DASHBOARD = """
from hillinfer.workbench import Workbench
workbench = Workbench()
workbench.show()
"""
SCORES = "document.querySelector('.hi-scores').hillinfer"


@pytest.fixture
def lab(tmp_path):
    jupytext = pytest.importorskip("jupytext")
    pytest.importorskip("playwright", reason="pip install 'hillinfer[browser]'")
    book = jupytext.reads("\n\n".join(f"# %%{cell}" for cell in (BOARD, ASKED, DASHBOARD)), "py:percent")
    book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    jupytext.write(book, tmp_path / "board.ipynb")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with serve(tmp_path) as (address, token), chromium() as page:
        yield Notebook(page, address, token, "board.ipynb")


def wait_scores(notebook, condition: str, timeout: int = 120_000) -> None:
    """Wait for a condition on the board's state `s`, its `rows` and its answers `a`."""
    traits = "...['state', 'rows', 'answers'].map(name => b.model.get(name))"
    notebook.page.wait_for_function(
        "() => { const b = document.querySelector('.hi-scores')?.hillinfer; "
        f"return b && ((s, rows, a) => {condition})({traits}) }}",
        timeout=timeout,
    )


def shot(notebook, name: str, height: int = 1200) -> None:
    page = notebook.page
    page.set_viewport_size(dict(width=1280, height=height))
    page.locator(".jp-OutputArea .hi-board").first.evaluate("e => e.closest('.jp-Cell').scrollIntoView()")
    page.wait_for_timeout(500)
    page.screenshot(path=SHOTS / f"{name}.png")
    page.set_viewport_size(dict(width=1280, height=900))


def test_the_board_fills_stops_and_goes_on_after_a_restart(lab):
    lab.run_cell(0)
    lab.run_cell(1)
    wait_scores(lab, "s.phase === 'kept' && !rows.length")
    lab.button("Run").click()
    wait_scores(lab, "rows.length >= 3 && s.done >= 5")
    shot(lab, "accuracy-running")
    lab.button("Stop").click()
    wait_scores(lab, "s.phase === 'stopped'")
    done = lab.page.evaluate(f"() => {SCORES}.model.get('state').done")
    shown = lab.page.evaluate("() => document.querySelectorAll('.hi-scroll tbody tr').length")
    kept = json.loads(lab.ask("import json; print(json.dumps([len(board.rows), len(board.table.rows)]))"))
    assert 5 <= done == kept[0] < 56 and shown == kept[1]
    restart = "() => window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.restart()"
    lab.page.evaluate(restart)
    lab.wait_idle()
    lab.run_cell(0)
    wait_scores(lab, f"s.phase === 'kept' && s.done === {done} && rows.length === {kept[1]}")
    lab.run_cell(1)
    lab.button("Run").click()
    wait_scores(lab, f"s.phase === 'done' && s.kept === {done} && s.done === 56")
    unique = "len({tuple(x[k] for k in KEY) for x in board.rows})"
    said = lab.ask(f"from hillinfer.longbench.results import KEY; print(len(board.rows), {unique})")
    assert said == "56 56"  # nothing was repeated
    shot(lab, "accuracy-done")
    assert lab.page.errors == []
    _open_a_cell_and_its_token(lab)


def _open_a_cell_and_its_token(lab):
    cell = lab.page.locator(".hi-cell[data-key*='|streaming|0.05|two_hop_1k']")
    cell.focus()
    lab.page.keyboard.press("Enter")  # keyboard alone reaches it
    wait_scores(lab, "a.task === 'two_hop_1k' && a.answers.length === 7")
    cards = lab.page.locator(".hi-card")
    reference = lab.ask("print(board.table.answers['reference'][0])")
    assert cards.count() == 7 and reference and reference in lab.page.locator(".hi-asking").inner_text()
    assert lab.page.locator(".hi-card mark").count() >= 1
    shot(lab, "accuracy-answers")
    lab.page.locator(".hi-card.hi-chosen .hi-open").click()
    lab.page.wait_for_function(
        "() => [...document.querySelectorAll('.hi-board')].map(e => e.hillinfer)"
        ".some(b => b.store?.state.phase === 'done' && b.cursor.step !== null)",
        timeout=60_000,
    )
    run, chosen = "board.workbench.runs[-1]", lab.page.locator(".hi-card.hi-chosen .hi-answer-text").inner_text()
    assert lab.ask(f"print({run}.answer)") == chosen.strip()
    [step] = [step for step in lab.boards("b.cursor?.step ?? null") if step is not None]
    assert int(lab.ask(f"print({run}.step_at(0))")) == step  # this answer parts at its first token
    shot(lab, "accuracy-token", 2000)
    assert lab.page.errors == []


def test_a_row_of_longbench_from_choosing_to_its_timeline(lab, tmp_path):
    """Generated rows and the bundled model; MODEL and LONGBENCH_DIR in the environment take real ones."""
    model, data, task = os.environ.get("MODEL"), os.environ.get("LONGBENCH_DIR"), os.environ.get("TASK", "hotpotqa")
    data = data or str(write_rows(tmp_path / "rows", ["hotpotqa"], words=150))
    lab.run_cell(2)
    lab.wait_board("b.time")
    lab.ask(f"workbench.data.value, workbench.origin.value = {data!r}, 'LongBench'; workbench.task.value = {task!r}")
    if model:
        lab.control("model").fill(model)
        lab.control("model").press("Tab")
        lab.button("Load").click()
        lab.ask("workbench.chosen.background.wait()")
    lab.control("row").fill(os.environ.get("ROW", "2"))
    lab.control("row").press("Tab")
    lab.page.wait_for_selector(f".hi-row:has-text('row {os.environ.get('ROW', '2')} of')")
    assert "reference" in lab.page.locator(".hi-row").inner_text()
    lab.button("Run").click()
    lab.wait_board("b.store.state.phase === 'done'", timeout=900_000)
    lab.page.wait_for_timeout(600)
    [seen] = lab.boards("({title: b.setting.textContent, status: b.status.textContent, spans: b.store.spans.n})")
    assert f"{task}, row" in seen["title"] and "score" in seen["status"] and seen["spans"] > 100
    shot(lab, "longbench-row", 1900)
    assert lab.page.errors == []
