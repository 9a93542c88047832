"""The attention map of 128K tokens in 32 layers, and of a run, in a real JupyterLab and a real Chromium."""

import json

import pytest

from tests.browser.lab import CHROMIUM, Notebook, chromium, serve
from tests.browser.test_first_notebook import DONE, SHOTS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
CELLS = (
    "from benchmarks.watching import long_map\nmap, view = long_map(4096, 8, 4)\nview",
    "from hillinfer.workbench import Workbench\nworkbench = Workbench()\nworkbench.show()",
)


@pytest.fixture
def lab(tmp_path):
    jupytext = pytest.importorskip("jupytext")
    pytest.importorskip("playwright", reason="pip install 'hillinfer[browser]'")
    book = jupytext.reads("\n\n".join(f"# %%\n{cell}" for cell in CELLS), "py:percent")
    book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    jupytext.write(book, tmp_path / "map.ipynb")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with serve(tmp_path) as (address, token), chromium() as page:
        yield Notebook(page, address, token, "map.ipynb")


def wait_map(notebook, condition: str) -> None:
    found = "[...document.querySelectorAll('.hi-map')].at(-1)?.hillinfer"
    notebook.page.wait_for_function(f"() => {{ const b = {found}; return b?.sharp && ({condition}) }}", timeout=60_000)


def test_map_shows_what_the_kernel_holds(lab):
    lab.run_cell(0)
    wait_map(lab, "b.tiles.size")
    canvas = lab.page.locator(".hi-map canvas")
    box = canvas.bounding_box()
    lab.page.mouse.move(box["x"] + 500, box["y"] + 20)
    wait_map(lab, "b.at && b.passage.querySelector('mark')?.textContent.includes('w')")
    [at] = lab.boards("({row: b.rows[b.at.row], first: b.at.first, last: b.at.last, said: b.spoken.textContent})")
    lab.ask(f"row = map.layers.rows[{at['row']}, 0][{at['first']}:{at['last']}].sum() / map.seen[{at['row']}]")
    share = float(lab.ask("print(100 * row)"))
    assert float(at["said"].split(": ")[1].split(" %")[0].removeprefix("at most ")) == pytest.approx(share, rel=0.06)
    marked = lab.page.locator(".hi-map mark").inner_text()
    assert marked == "".join(f"w{i} " for i in range(at["first"], at["last"]))
    canvas.focus()
    for _ in range(14):
        lab.page.keyboard.press("w")
    wait_map(lab, "b.level === 0 && b.view.to - b.view.from < 16")
    before = lab.boards("b.at.first")[0]
    lab.page.keyboard.press("ArrowRight")
    wait_map(lab, f"b.at.first === {before + 1} && !b.spoken.textContent.includes('loading')")
    lab.page.keyboard.press("Enter")
    wait_map(lab, f"b.layer === {at['row']} && b.rows.length === 4")
    lab.page.keyboard.press("0")
    wait_map(lab, "b.view.to === 4096")
    assert lab.ask("print(view.layer)") == str(at["row"])
    assert lab.boards("new Set(b.pixels).size")[0] > 50  # drawn
    lab.page.screenshot(path=SHOTS / "map-heads.png")
    lab.page.keyboard.press("Escape")
    wait_map(lab, "b.layer === null")
    assert lab.page.errors == []


def test_map_of_a_run_opens_below_its_board(lab):
    lab.run_cell(1)
    lab.wait_board("b.time")
    lab.ask("workbench.attention.value = 'every step, all tokens'")
    lab.button("Run").click()
    lab.wait_board(DONE)
    lab.button("Attention map").click()
    wait_map(lab, "b.tiles.size")
    text = lab.boards("b.textAround ? [b.rows.length, b.n, b.state.steps] : null")[-1]
    held = lab.ask("m = workbench.runs[-1].record.map; print([len(m.counts), m.n, m.steps])")
    assert json.loads(held) == text
    lab.page.set_viewport_size(dict(width=1280, height=1700))
    lab.page.locator(".hi-map").evaluate("e => e.scrollIntoView({block: 'end'})")
    box = lab.page.locator(".hi-map canvas").bounding_box()
    lab.page.mouse.move(box["x"] + 600, box["y"] + 50)
    wait_map(lab, "b.passage.querySelector('mark')")
    lab.page.screenshot(path=SHOTS / "map-run.png")
    found = lab.page.locator(".hi-map mark").inner_text().replace("↵ ", "\n")
    assert found.strip() and found in lab.ask("print(workbench.tokenizer.decode(workbench.runs[-1].case.context))")
    assert lab.page.errors == []
