"""The widgets outside Jupyter: a page that knows only what anywidget documents, without network, frames or globals.

marimo, VS Code and Colab give a widget's module exactly this: get, set, save_changes, on, off and send.
"""

import base64

import pytest

from hillinfer.timeline import Counters, Hits, Timeline
from tests.browser.lab import CHROMIUM, chromium

widgets = pytest.importorskip("ipywidgets")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
# Nothing may be loaded from anywhere. The widget is drawn in a shadow root, as marimo does it.
PAGE = """<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:; style-src 'unsafe-inline'">
<body style="margin: 8px"><div id="host"></div>"""
RENDER = """async ({ esm, css, traits }) => {
    const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
    const root = document.getElementById("host").attachShadow({ mode: "open" }), changed = new Set(), heard = {};
    root.innerHTML = `<style>${css}</style><div></div>`;
    const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
    const tell = (name, ...values) => (heard[name] ?? []).slice().forEach((f) => f(...values));
    const take = (answer) => {
        for (const [name, value] of Object.entries(answer.traits))
            if (JSON.stringify(value) !== JSON.stringify(traits[name])) tell("change:" + name, (traits[name] = value));
        for (const [content, buffers] of answer.messages) tell("msg:custom", content, buffers.map(bytes));
    };
    const ask = async (kind, content) => take(await window.kernel(kind, content));
    const model = {
        get: (name) => traits[name],
        set: (name, value) => { traits[name] = value; changed.add(name); tell("change:" + name); },
        save_changes: () => {
            ask("set", Object.fromEntries([...changed].map((name) => [name, traits[name]])));
            changed.clear();
        },
        on: (name, f) => (heard[name] ??= []).push(f),
        off: (name, f) => { heard[name] = (heard[name] ?? []).filter((g) => g !== f); },
        send: (content) => ask("send", content),
    };
    window.ended = await module.default.render({ model, el: root.lastChild });
    window.view = root.querySelector(".hi-board").hillinfer;
}"""


def traits_of(widget) -> dict:
    own = {name for name in widget.keys if not name.startswith("_")} - {"layout", "tabbable", "tooltip"}
    return {name: getattr(widget, name) for name in own}


def draw(page, widget) -> None:
    """Draw the widget in a page, with the Python side as its kernel."""
    sent = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers or []))

    def kernel(kind: str, content: dict) -> dict:
        sent.clear()
        if kind == "set":
            for name, value in content.items():
                setattr(widget, name, value)
        else:
            widget._handle_custom_msg(content, [])
        coded = [[message, [base64.b64encode(bytes(part)).decode() for part in parts]] for message, parts in sent]
        return {"messages": coded, "traits": traits_of(widget)}

    page.set_content(PAGE)
    page.expose_function("kernel", kernel)
    page.evaluate(RENDER, {"esm": widget._esm, "css": widget._css, "traits": traits_of(widget)})


@pytest.fixture
def page():
    pytest.importorskip("playwright", reason="pip install 'hillinfer[browser]'")
    with chromium() as page:
        page.loaded = []
        page.on("request", lambda request: page.loaded.append(request.url))
        yield page
        assert page.errors == []
        assert not [url for url in page.loaded if not url.startswith(("blob:", "about:", "data:"))]


def recorded() -> tuple[Timeline, Counters]:
    timeline, counters = Timeline(), Counters()
    for step in range(20):
        for i, kind in enumerate(("select", "attend", "dense")):
            timeline.add("cpu", kind, 0, step, 10_000 * step + 3000 * i, 10_000 * step + 3000 * i + 2500, 64)
        counters.rows.append(Hits(step, 0, 100, 10, 10, 2, 5, 3, 1, 0, 0, 0))
    return timeline, counters


def test_board(page):
    from hillinfer.workbench import show_record

    timeline, counters = recorded()
    board = show_record(timeline, counters)
    draw(page, board)
    page.wait_for_function("() => window.view.store.spans.n === 60 && window.view.stat?.boxes > 10")
    page.locator(".hi-time").focus()
    page.keyboard.press("n")
    page.wait_for_function("() => window.view.spoken.textContent.includes('layer 0, step')")
    page.evaluate("() => window.view.point({ step: 7 })")
    page.wait_for_function("() => window.view.why.textContent.includes('Step 7 took')")
    assert board.cursor["step"] == 7
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => window.view.root.dataset.dark === 'true'")
    assert page.evaluate("() => getComputedStyle(window.view.root).backgroundColor") == "rgb(22, 25, 29)"
    page.evaluate("() => document.body.classList.add('vscode-light')")
    page.wait_for_function("() => window.view.root.dataset.dark === 'false'")
    with page.expect_download() as caught:
        page.get_by_role("button", name="Trace").click()
    assert caught.value.suggested_filename == "hillinfer-trace.json.gz"
    page.evaluate("() => window.ended()")


def test_attention_map(page):
    from benchmarks.watching import long_map

    _, view = long_map(2048, 4, 2)
    draw(page, view)
    page.wait_for_function("() => window.view.sharp && window.view.tiles.size")
    box = page.locator(".hi-map canvas").bounding_box()
    page.mouse.move(box["x"] + 400, box["y"] + 20)
    page.wait_for_function("() => window.view.passage.querySelector('mark')?.textContent.startsWith('w')")
    page.locator(".hi-map select").select_option("2")
    page.wait_for_function("() => window.view.rows.length === 2 && window.view.sharp")
    assert view.layer == 2


def test_runs_over_each_other(page):
    from types import SimpleNamespace

    from hillinfer.workbench import show_runs

    timeline, counters = recorded()
    run = SimpleNamespace(timeline=timeline, counters=counters)
    chart = show_runs({"one": run, "two": run, "three": run})
    draw(page, chart)
    page.wait_for_function("() => window.view.drawn === 3")
    page.locator(".hi-overlay select").select_option("selected tokens")
    page.wait_for_function("() => window.view.unit === 'tokens' && window.view.lines[0].median === 10")
    assert chart.figure == "selected tokens"


def test_scores(page):
    from hillinfer.workbench.accuracy import ScoreTable

    table = ScoreTable()
    about = dict(model="m", question="stepwise", n=2, planned=4, tasks={"lines": 50.0}, score=50.0)
    table.rows = [about | dict(system=system, alpha=1.0, low=None) for system in ("full", "topk")]
    draw(page, table)
    page.locator(".hi-cell").first.click()
    page.wait_for_function("() => window.view.model.get('cell').task === 'lines'")
    assert table.cell["system"] == "full"
