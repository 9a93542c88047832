"""The first notebook in a real JupyterLab and a real Chromium. What is drawn counts, not what is said."""

import gzip
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.lab import CHROMIUM, ROOT, Notebook, chromium, serve

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
SHOTS = Path(os.environ.get("HILLINFER_SHOTS", ROOT / "out" / "browser"))
CELL = 3  # of the notebook: the one that shows the dashboard
OURS = "import threading; print([t.name for t in threading.enumerate() if t.name.startswith('hillinfer')])"
DONE, LIVE = "b.store.state.phase === 'done'", "b.store.state.phase === 'decode'"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    jupytext = pytest.importorskip("jupytext")
    pytest.importorskip("playwright", reason="pip install 'hillinfer[browser]'")
    folder = tmp_path_factory.mktemp("lab")
    jupytext.write(jupytext.read(ROOT / "notebooks/00_first_run.py"), folder / "00_first_run.ipynb")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with serve(folder) as (address, token), chromium() as page:
        yield Notebook(page, address, token, "00_first_run.ipynb")


@pytest.fixture
def fresh(notebook):
    """The dashboard's cell run anew."""
    for index in range(CELL + 1):
        notebook.run_cell(index)
    notebook.wait_board("b.time && !b.store.tokens.length")
    return notebook


def shot(notebook, name: str, height: int = 1500) -> None:
    """The dashboard's output, whole, as a person sees it at 1280 pixels."""
    page = notebook.page
    page.set_viewport_size(dict(width=1280, height=height))
    page.evaluate("() => document.querySelector('.jp-OutputArea .hi-board').closest('.jp-Cell').scrollIntoView()")
    page.wait_for_timeout(700)
    page.screenshot(path=SHOTS / f"{name}.png")
    page.set_viewport_size(dict(width=1280, height=900))


def test_run_fills_text_and_charts_with_what_the_kernel_holds(fresh):
    slider = fresh.page.locator(".jp-OutputArea .widget-slider .noUi-handle, .jp-OutputArea [role=slider]").first
    slider.focus()
    fresh.page.keyboard.press("ArrowRight")
    assert fresh.ask("print(round(workbench.alpha.value, 2))") == "0.22"
    fresh.button("Run").click()
    fresh.wait_board(f"{LIVE} && b.store.tokens.length > 20 && b.store.spans.n > 500")
    shot(fresh, "running")
    fresh.wait_board(DONE)
    fresh.page.wait_for_timeout(500)
    shot(fresh, "done")
    held = "r = workbench.runs[-1]; print(len(r.tokens), len(r.timeline.spans), len(r.counters.rows), r.answer)"
    tokens, spans, hits, answer = fresh.ask(held).split(maxsplit=3)
    [seen] = fresh.boards("({...b.store.have(), text: b.text.innerText, heat: b.cells, drawn: b.hitsFrame})")
    assert (seen["tokens"], seen["spans"], seen["hits"]) == (int(tokens), int(spans), int(hits))
    assert int(tokens) > 60 and int(hits) == 6 * int(tokens)
    assert answer in seen["text"]
    assert seen["heat"]["layers"] == 6 and seen["heat"]["heads"] == 8 and seen["drawn"]["n"] == int(tokens)
    assert fresh.page.errors == []


def test_what_is_drawn_is_not_blank_and_fits(fresh):
    fresh.button("Run").click()
    fresh.wait_board(DONE)
    fresh.page.wait_for_timeout(500)
    colours = """b.panels.map(p => { const c = p.canvas,
        d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        const seen = new Set();
        for (let i = 0; i < d.length; i += 4) seen.add(d[i] << 16 | d[i+1] << 8 | d[i+2]); return seen.size })"""
    [counts] = fresh.boards(colours)
    assert len(counts) == 5 and min(counts) > 5
    wide = fresh.page.evaluate("""() => { const box = document.querySelector('.jp-OutputArea-output .hi-board')
        .closest('.jp-OutputArea-output'); return [box.scrollWidth, box.clientWidth] }""")
    assert wide[0] <= wide[1]


def test_a_step_chosen_in_one_view_is_marked_in_all(fresh):
    fresh.button("Run").click()
    fresh.wait_board(DONE)
    fresh.page.locator(".hi-text span").nth(10).click()
    fresh.wait_board("b.cursor.step !== null && b.store.detail.heat.step <= b.cursor.step")
    [step] = fresh.boards("b.cursor.step")
    assert int(fresh.ask("print(workbench.runs[-1].tokens[10].step)")) == step
    fresh.wait_board(
        f"b.view.from <= b.store.spans.windowOf({step})[0] && b.view.to >= b.store.spans.windowOf({step})[1]"
    )
    box = fresh.page.locator(".hi-section canvas").first.bounding_box()
    fresh.page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"])
    fresh.wait_board("b.cursor.layer !== null && b.store.detail.distribution.head === b.cursor.head")
    shot(fresh, "linked")
    wanted = "s = workbench.runs[-1].record.snapshots_at({0[step]})[1][{0[layer]}]; print(s.mass[{0[head]}].tolist())"
    [cursor] = fresh.boards("b.cursor")
    [mass] = fresh.boards("b.store.detail.distribution.mass")
    assert json.loads(fresh.ask(wanted.format(cursor))) == pytest.approx(mass, abs=1e-3)


def test_timeline_zooms_by_wheel_and_keys_and_has_a_table(fresh):
    fresh.button("Run").click()
    fresh.wait_board(DONE)
    canvas = fresh.page.locator(".hi-time").first
    canvas.scroll_into_view_if_needed()
    canvas.hover()
    width = lambda: fresh.boards("b.view.to - b.view.from")[0]  # noqa: E731
    canvas.focus()
    fresh.page.keyboard.press("0")
    whole = width()
    fresh.page.mouse.wheel(0, -400)
    fresh.page.wait_for_timeout(200)
    assert width() < 0.6 * whole
    fresh.page.keyboard.press("w")
    fresh.page.wait_for_timeout(100)
    assert width() < 0.4 * whole
    before = fresh.boards("b.view.from")[0]
    fresh.page.keyboard.press("d")
    assert fresh.boards("b.view.from")[0] > before
    fresh.page.keyboard.press("n")
    fresh.page.keyboard.press("n")
    fresh.page.wait_for_timeout(300)
    assert "measured" in fresh.boards("b.spoken.textContent")[0] and "layer" in fresh.boards("b.spoken.textContent")[0]
    fresh.page.keyboard.press("t")
    assert fresh.page.locator(".hi-table tbody tr").count() > 5
    svg = fresh.boards("b.svg()")[0]
    assert svg.startswith("<svg") and svg.count("<rect") > 20
    fresh.page.keyboard.press("t")
    fresh.page.keyboard.press("0")
    fresh.page.wait_for_timeout(400)
    overlap = float(fresh.ask("print(workbench.runs[-1].timeline.overlap())"))
    assert fresh.boards("b.overlap")[0] == pytest.approx(overlap, abs=1e-6)


def test_why_is_one_click_on_a_token(fresh):
    fresh.button("Run").click()
    fresh.wait_board(DONE)
    fresh.page.wait_for_selector(".hi-why .hi-sentence:has-text('steps took')")
    fresh.button("slowest step").click()
    fresh.page.wait_for_selector(".hi-why .hi-sentence:has-text('times the median step')")
    assert fresh.page.locator(".hi-why h4").inner_text() == "Why was this token slow?"
    [step] = fresh.boards("b.cursor.step")
    said = fresh.ask(f"e = workbench.runs[-1]; import hillinfer; print(hillinfer.explain(e, {step}).sentence)")
    assert fresh.page.locator(".hi-why .hi-sentence").inner_text() == said
    assert fresh.page.locator(".hi-why tbody tr").count() >= 5
    fresh.page.locator(".hi-text span").nth(12).click()
    fresh.page.wait_for_function("s => document.querySelector('.hi-why .hi-sentence').textContent !== s", arg=said)
    shot(fresh, "why")


def test_exports_are_whole_files(fresh, tmp_path):
    fresh.button("Run").click()
    fresh.wait_board(DONE)
    spans = int(fresh.ask("print(len(workbench.runs[-1].timeline.spans))"))
    for name in ("PNG", "Trace", "HTML"):
        with fresh.page.expect_download() as caught:
            fresh.button(name).click()
        caught.value.save_as(tmp_path / name)
    assert (tmp_path / "PNG").read_bytes().startswith(b"\x89PNG")
    events = json.loads(gzip.decompress((tmp_path / "Trace").read_bytes()))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == spans
    page = fresh.page.context.browser.new_page()
    (tmp_path / "HTML").rename(tmp_path / "board.html")
    page.goto(f"file://{tmp_path / 'board.html'}")
    page.wait_for_function("() => window.hillinferPainted")
    assert page.evaluate("() => document.querySelector('.hi-board').hillinfer.store.spans.n") == spans
    page.screenshot(path=SHOTS / "exported.png", full_page=True)
    page.close()


PERFETTO = b"""<!doctype html><script>
window.heard = [];
window.addEventListener("message", (e) => {
    if (e.source !== window.opener) return;
    if (e.data === "PING" && window.heard.push("PING") > 2) e.source.postMessage("PONG", "*");
    else if (e.data.perfetto) window.trace = e.data.perfetto;
});
</script>"""


@contextmanager
def fake_perfetto():
    """The address of a page that shakes hands as ui.perfetto.dev documents it."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PERFETTO)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_trace_opens_in_perfetto_or_is_saved(fresh, tmp_path):
    fresh.button("Run").click()
    fresh.wait_board(DONE)
    spans = int(fresh.ask("print(len(workbench.runs[-1].timeline.spans))"))
    with fake_perfetto() as address:
        fresh.ask(f"workbench._boards[0].perfetto = {address!r}")
        fresh.wait_board(f"b.model.get('perfetto') === {address!r}")
        with fresh.page.expect_popup() as opened:
            fresh.button("Perfetto").click()
        tab = opened.value
        tab.wait_for_function("() => window.trace")
        assert tab.evaluate("() => [window.trace.title, window.trace.fileName]") == [
            "hillinfer",
            "hillinfer-trace.json.gz",
        ]
        data = bytes(tab.evaluate("() => [...new Uint8Array(window.trace.buffer)]"))
        assert sum(event["ph"] == "X" for event in json.loads(gzip.decompress(data))["traceEvents"]) == spans
        tab.close()
    with fresh.page.expect_download(timeout=20_000) as caught:  # nobody answers there now
        fresh.button("Perfetto").click()
    assert gzip.decompress(Path(caught.value.path()).read_bytes()) == gzip.decompress(data)
    online = "Object.defineProperty(navigator, 'onLine', { configurable: true, get: () => false })"
    fresh.page.evaluate(f"() => {{ {online} }}")  # a machine without a network; the kernel is on it
    with fresh.page.expect_download(timeout=5_000):
        fresh.button("Perfetto").click()
    fresh.page.evaluate("() => { delete navigator.onLine }")
    assert len(fresh.page.context.pages) == 1


def test_stop_ends_within_one_token(fresh):
    fresh.button("Run").click()
    fresh.wait_board(f"{LIVE} && b.store.tokens.length > 30")
    fresh.ask(
        "r = workbench.runs[-1]; plain = r.stop\n"
        "def noted():\n    r.at_stop = r.at_stop if hasattr(r, 'at_stop') else len(r.tokens); plain()\n"
        "r.stop = noted"
    )
    fresh.button("Stop").click()
    fresh.wait_board("b.store.state.phase === 'stopped'")
    asked, ended = map(int, fresh.ask("print(r.at_stop, len(r.tokens))").split())
    assert 30 < ended <= asked + 1
    assert fresh.ask(OURS) == "[]"
    assert fresh.boards("b.store.tokens.length") == [ended]  # the last state arrived


def test_running_the_cell_again_leaves_no_thread(fresh):
    fresh.button("Run").click()
    fresh.wait_board(f"{LIVE} && b.store.tokens.length > 10")
    fresh.ask("old = workbench.runs[-1]")
    fresh.run_cell(CELL)
    assert fresh.ask("print(old.phase, old.alive)") == "stopped False"
    assert fresh.ask(OURS) == "[]"
    fresh.wait_board("b.time && !b.store.tokens.length")


def test_interrupt_stops_a_run_between_cells_and_in_one(fresh):
    fresh.button("Run").click()
    fresh.wait_board(f"{LIVE} && b.store.tokens.length > 10")
    fresh.interrupt()
    fresh.wait_board("b.store.state.phase === 'stopped'")
    fresh.page.wait_for_timeout(500)
    assert fresh.ask(OURS) == "[]"
    fresh.page.evaluate(
        """() => { const k = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
        window.long = k.requestExecute({ code: "workbench.run()" }) }"""
    )
    fresh.wait_board(f"{LIVE} && b.store.tokens.length > 10")
    fresh.interrupt()
    fresh.page.evaluate("() => window.long.done")
    assert fresh.ask("print(workbench.runs[-1].phase)") == "stopped"
    assert fresh.ask(OURS) == "[]"


def test_compare_shows_two_runs_and_their_differences(fresh):
    fresh.button("Run").click()
    fresh.wait_board(DONE)
    fresh.control("system").select_option("streaming")
    fresh.button("Compare").click()
    fresh.wait_board(DONE, 1)
    fresh.page.wait_for_selector(".hi-differences")
    titles = fresh.boards("b.title.textContent")
    assert titles[0].startswith("hillinfer") and titles[1].startswith("streaming")
    places = """e => [...e.querySelectorAll('.hi-top, .hi-section')]
        .map(s => Math.round(s.getBoundingClientRect().top))"""
    fresh.page.wait_for_timeout(500)
    one, other = (fresh.page.locator(".hi-compared .hi-board").nth(i).evaluate(places) for i in (0, 1))
    assert len(one) == 7 and one == other  # row beside row
    rows = fresh.page.locator(".hi-differences tr").count()
    assert rows >= 10
    fresh.page.locator(".hi-text span").nth(5).click()
    fresh.wait_board("b.cursor.step !== null", 1)  # one cursor for both
    shot(fresh, "compare", 2000)


def test_three_runs_are_laid_over_each_other(fresh):
    for system, button in (("hillinfer", "Run"), ("streaming", "Compare"), ("full", "Compare")):
        fresh.control("system").select_option(system)
        fresh.button(button).click()
        fresh.page.wait_for_function(
            "n => [...document.querySelectorAll('.hi-overlay')].at(-1)?.hillinfer.lines.length === n",
            arg=dict(hillinfer=1, streaming=2, full=3)[system],
        )
    chart = fresh.page.locator(".hi-overlay").last
    chart.scroll_into_view_if_needed()
    chart.locator("canvas").focus()
    fresh.page.keyboard.press("ArrowRight")
    said = chart.locator(".hi-facts").inner_text()
    assert said.startswith("step 1: hillinfer, alpha 0.2 ") and said.count(" ms") == 3
    chart.locator("select").select_option("missed, demoted before")
    drawn = "b => { const e = document.querySelectorAll('.hi-overlay'); return e[e.length - 1].hillinfer"
    fresh.page.wait_for_function(f"{drawn}.unit === 'tokens' }}")
    assert fresh.page.evaluate(f"{drawn}.drawn }}") == 3
    held = "import numpy as np; print(np.median(workbench.compared.chart.runs['hillinfer, alpha 0.2'][{!r}]))"
    median = float(fresh.ask(held.format("missed, demoted before")))
    assert fresh.page.evaluate(f"{drawn}.lines[0].median }}") == median > 0
    chart.locator("select").select_option("time")
    chart.locator(".hi-legend button").nth(1).click()
    fresh.page.wait_for_function(f"{drawn}.drawn === 2 }}")
    chart.locator(".hi-legend button").nth(1).click()
    fresh.page.set_viewport_size(dict(width=1280, height=1000))
    chart.evaluate("e => e.scrollIntoView({block: 'center'})")
    fresh.page.mouse.move(800, 480)
    fresh.page.wait_for_timeout(500)
    fresh.page.screenshot(path=SHOTS / "three-runs.png")


def test_an_error_is_one_line_that_names_the_fix(fresh):
    fresh.ask("workbench.folder.value = '/nowhere/at/all'")
    fresh.button("Run").click()
    message = fresh.page.locator(".jp-OutputArea [role=status]", has_text="does not exist")
    message.wait_for(timeout=10_000)
    assert "mkdir" in message.inner_text()
    assert fresh.ask(OURS) == "[]"
