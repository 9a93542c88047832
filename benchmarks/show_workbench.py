"""`make show-workbench`: measure all machine-checkable claims about the workbench.

MINUTES=10 sets the length of the long run (default 1), PAIRS the number of paired windows of the slow-down measurement.
`python -m benchmarks.show_workbench canvas map cost traffic sizes tests` runs selected parts.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from benchmarks.claims import ROOT, Claim, tests, verdict
from tests.browser.lab import Notebook, chromium, serve

MINUTES, PAIRS = float(os.environ.get("MINUTES", "1")), int(os.environ.get("PAIRS", "40"))
SPANS, LANES = 100_000, 4
TOKENS, LAYERS = 131_072, 32
FIRST = "00_first_run.ipynb"


def big_timeline():
    """A timeline with the claimed number of spans, in four concurrent lanes."""
    import random

    from hillinfer.timeline import Timeline

    timeline, rng, now = Timeline(), random.Random(0), [0] * LANES
    work = [("gpu", "attend"), ("cpu", "score"), ("drive", "read"), ("link", "transfer")]
    for i in range(SPANS):
        lane, length = i % LANES, rng.randint(2_000, 300_000)
        start = now[lane] + rng.randint(0, 20_000)
        now[lane] = start + length
        timeline.add(*work[lane], i % 32, i // 200, start, now[lane], length)
    return timeline


def canvas() -> list[Claim]:
    """First paint and zoom of 100,000 spans, in a page of 1280 x 900 pixels."""
    from hillinfer.workbench import show_timeline

    paints, zooms = [], []
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "board.html"
        page_file.write_text(show_timeline(big_timeline()).html(), encoding="utf-8")
        for _ in range(5):
            with chromium() as page:
                page.goto(f"file://{page_file}")
                page.wait_for_function("() => window.hillinferPainted")
                paints.append(page.evaluate("() => window.hillinferPainted"))
                shown = page.evaluate("() => document.querySelector('.hi-board').hillinfer.stat.shown")
                zooms += page.evaluate("""async () => {
                    const board = document.querySelector(".hi-board").hillinfer, took = [];
                    const frame = () => new Promise((done) => requestAnimationFrame(done));
                    board.look(board.store.spans.t0, board.store.spans.t1);
                    await frame(); await frame();
                    for (let i = 0; i < 24; i++) {
                        await frame();
                        const start = performance.now();
                        board.zoom(i < 12 ? 0.7 : 1 / 0.7);
                        const drawn = board.time.frame;
                        while (board.time.frame === drawn) await frame();
                        took.push(performance.now() - start);
                    }
                    return took;
                }""")
    middle = statistics.median(paints)
    text = f"{middle:.0f} ms ({min(paints):.0f} to {max(paints):.0f}, 5 pages, data decoded included)"
    slow = statistics.quantiles(zooms, n=20)[-1]
    figure = f"median {statistics.median(zooms):.0f} ms, 95 % under {slow:.0f} ms, {len(zooms)} zooms"
    return [
        Claim(f"{shown:,} spans: first paint", text, "300 ms", middle < 300 and shown == SPANS).show(),
        Claim(f"{shown:,} spans: zoom, a frame", figure, "50 ms", slow < 50).show(),
    ]


FRAMES = """async (act) => { // ms until the next drawn frame, and until it is as fine as the screen
    const map = document.querySelector(".hi-map").hillinfer, drawn = [], sharp = [];
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    const box = map.panel.canvas.getBoundingClientRect();
    for (let i = 0; i < 48; i++) {
        await frame();
        const start = performance.now(), before = map.panel.frame;
        if (act === "zoom") map.zoom(i < 24 ? 0.65 : 1 / 0.65, box.width * 0.4);
        else map.panel.canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: box.x + 80 + 15 * i,
                                                                              clientY: box.y + 10 + 7 * i }));
        while (map.panel.frame === before) await frame();
        drawn.push(performance.now() - start);
        while (!map.sharp) await frame();
        sharp.push(performance.now() - start);
    }
    return [drawn, sharp];
}"""


def attention_map() -> list[Claim]:
    """The attention of 131,072 tokens in 32 layers of 32 heads, made up, in JupyterLab; and as a page of its own."""
    import jupytext

    text, claims, name = f"{TOKENS:,} tokens x {LAYERS} layers", [], "map.ipynb"
    cells = "import tracemalloc\nfrom benchmarks import watching\ntracemalloc.start()\n"
    cells += f"map, view = watching.long_map({TOKENS}, {LAYERS}, {LAYERS})\n\n# %%\nview"
    with tempfile.TemporaryDirectory() as folder:
        book = jupytext.reads(f"# %%\n{cells}", "py:percent")
        book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
        jupytext.write(book, Path(folder) / name)
        with serve(Path(folder)) as (address, token), chromium() as page:
            notebook, paints = Notebook(page, address, token, name), []
            notebook.run_cell(0)
            notebook.ask("tracemalloc.reset_peak()")
            for _ in range(5):
                notebook.run_cell(1)
                page.wait_for_function("() => document.querySelector('.hi-map')?.hillinfer.paintedMs")
                paints.append(page.evaluate("() => document.querySelector('.hi-map').hillinfer.paintedMs"))
                page.evaluate("() => document.querySelector('.hi-map').remove()")
            notebook.run_cell(1)
            page.wait_for_function("() => document.querySelector('.hi-map')?.hillinfer.paintedMs")
            moved = {act: page.evaluate(FRAMES, act) for act in ("zoom", "hover")}
            held = float(notebook.ask("print(tracemalloc.get_traced_memory()[1] / 1e6)"))
            own = float(notebook.ask("print(map.nbytes / 1e6)"))
            page_file = Path(folder) / "map.html"
            notebook.ask(f"open({str(page_file)!r}, 'w').write(view.html())")
        with chromium() as page:
            page.goto(f"file://{page_file}")
            page.wait_for_function("() => window.hillinferPainted")
            alone = page.evaluate("() => window.hillinferPainted")
    middle = statistics.median(paints)
    figure = f"{middle:.0f} ms ({min(paints):.0f} to {max(paints):.0f}, 5 times in Lab); as a page {alone:.0f} ms"
    claims.append(Claim(f"{text}: first paint", figure, "300 ms", max(middle, alone) < 300).show())
    for act, (drawn, sharp) in moved.items():
        slow, fine = (statistics.quantiles(one, n=20)[-1] for one in (drawn, sharp))
        figure = f"median {statistics.median(drawn):.0f} ms, 95 % under {slow:.0f} ms; tiles within {fine:.0f} ms"
        claims.append(Claim(f"{text}: {act}, a frame", figure, "50 ms", slow < 50).show())
    figure = f"{own:.1f} MB of sums, {held:.1f} MB with the view and its tiles at the peak"
    claims.append(Claim(f"{text} x {LAYERS} heads: kernel memory", figure, "64 MB", held < 64).show())
    return claims


WATCH = """() => {
    const kernel = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
    const board = document.querySelector(".hi-board").hillinfer, seen = { at: [], bytes: [], paints: [] };
    kernel.iopubMessage.connect((_, m) => {
        seen.at.push(performance.now());
        seen.bytes.push(JSON.stringify(m.content).length + (m.buffers ?? []).reduce((n, b) => n + b.byteLength, 0));
    });
    const draw = board.refresh.bind(board);
    const now = () => { if (board.store.state.phase === "decode") seen.paints.push(performance.now()); };
    board.refresh = () => { draw(); now(); };
    window.seen = seen;
}"""


def peak(at: list[float], amount: list[float], seconds: float = 3.0) -> float:
    """The peak rate per second over any window of this length; Jupyter's limits apply to three seconds."""
    best = total = start = 0
    for end, now in enumerate(at):
        total += amount[end]
        while at[start] < now - 1e3 * seconds:
            total -= amount[start]
            start += 1
        best = max(best, total)
    return best / seconds


def in_lab(*checks: Callable[[Notebook], list[Claim]]) -> list[Claim]:
    """A dashboard in a real JupyterLab and Chromium, on the cores that also run the model."""
    import jupytext

    claims = []
    with tempfile.TemporaryDirectory() as folder:
        jupytext.write(jupytext.read(ROOT / "notebooks" / "00_first_run.py"), Path(folder) / FIRST)
        with serve(Path(folder)) as (address, token), chromium() as page:
            notebook = Notebook(page, address, token, FIRST)
            for index in range(4):
                notebook.run_cell(index)
            notebook.wait_board("b.time")
            page.evaluate("() => document.querySelector('.hi-board').scrollIntoView()")
            notebook.ask("from benchmarks import watching")
            for check in checks:
                claims += check(notebook)
    return claims


def slowdown(notebook: Notebook) -> list[Claim]:
    """ms/token with and without the dashboard in view, alternating within one run."""
    claims = []
    for system, what in (("hillinfer", "the embedded model, KV on the drive"), ("full", "both cores at work")):
        if system == "full":
            notebook.ask("watching.keep_busy(workbench)")
        notebook.ask(f"watching.own_text(workbench, '{system}', 6000)")
        said = notebook.ask(f"watching.windows(workbench, {PAIRS}, 1.5)").split()
        low, middle, high, n, *cpu = map(float, said)
        figure = f"{middle - 1:+.1%} (median of {n:.0f} pairs of windows, quartiles {low - 1:+.1%} and {high - 1:+.1%})"
        claims.append(Claim(f"{system}, {what}: what watching costs a token", figure, "+5 %", middle < 1.05).show())
        more = zip(("kernel", "server", "browser"), cpu[:3], cpu[3:], strict=True)
        text = ", ".join(f"{name} {1e3 * (on - off):+.0f} ms" for name, on, off in more)
        print(f"       | {system}: CPU time in a second, watched less not watched | {text}", flush=True)
    return claims


def long_run(notebook: Notebook) -> list[Claim]:
    """Several minutes of generation: paint rate, Jupyter traffic, and completeness at the end."""
    notebook.ask("watching.own_text(workbench, 'hillinfer', 6000)")
    notebook.page.evaluate(WATCH)
    held = notebook.ask(f"watching.for_minutes(workbench, {MINUTES})")
    paints = notebook.page.evaluate("() => window.seen.paints")
    gaps = [b - a for a, b in pairwise(paints)]
    gaps = [gap for gap in gaps if gap < 4000]  # a longer one is the prefill between two runs
    rate, slow = 1000 / statistics.median(gaps), statistics.quantiles(gaps, n=20)[-1]
    figure = f"median {rate:.1f} Hz, 95 % of the gaps under {slow:.0f} ms, {len(gaps)} gaps"
    claim = Claim("page updates while both cores generate", figure, "2 Hz", rate >= 2 and slow <= 500).show()
    return [claim, *traffic(notebook, held, f"{MINUTES:g} min")]


def ten_minutes(notebook: Notebook) -> list[Claim]:
    """Synthetic: the rows of a real run, repeated at five times its speed up to ten minutes' worth."""
    notebook.ask("watching.own_text(workbench, 'full', 400); workbench.run()")
    notebook.page.evaluate("() => { for (const own of Object.values(window.seen)) own.length = 0; }")
    held = notebook.ask("watching.again(workbench, 10, 5)")
    return traffic(notebook, held, "rows of 10 min in 2 (synthetic)", 5)


def traffic(notebook: Notebook, held: str, name: str, faster: int = 1) -> list[Claim]:
    """Jupyter's traffic, and equality of the page's final tokens, spans and hits with those of the run."""
    notebook.page.wait_for_timeout(1000)
    seen = notebook.page.evaluate("() => window.seen")
    [shown] = notebook.boards("b.store.have()")
    messages, data = peak(seen["at"], [1] * len(seen["at"])), peak(seen["at"], seen["bytes"])
    figure = f"{data / faster:,.0f}" + (f" at the run's own pace, {data:,.0f} as fast as here" if faster > 1 else "")
    arrived = list(map(int, held.split())) == [shown["tokens"], shown["spans"], shown["hits"]]
    return [
        Claim(f"{name}: messages/s, busiest 3 s", f"{messages:.0f}", "1,000 (Jupyter's)", messages < 1000).show(),
        Claim(f"{name}: bytes/s, busiest 3 s", figure, "1,000,000 (Jupyter's)", data / faster < 1e6).show(),
        Claim(f"{name}: rows in the page at the end", f"{shown}", f"those of the run: {held}", arrived).show(),
    ]


def sizes() -> list[Claim]:
    """Committed notebooks and the gallery."""
    books = sorted((ROOT / "notebooks").glob("*.ipynb"))
    largest = max(book.stat().st_size for book in books)
    text = [book.read_text(encoding="utf-8") for book in books]
    state = sum('"widgets"' in one or '"application/vnd.jupyter.widget-state+json"' in one for one in text)
    pages = list((ROOT / "docs" / "gallery").glob("*.md"))
    codes = sum("\x1b" in page.read_text(encoding="utf-8") for page in pages)
    script = sum("<script" in page.read_text(encoding="utf-8") for page in pages)
    return [
        Claim(f"largest of {len(books)} notebooks", f"{largest:,} bytes", "1 MB", largest < 1e6).show(),
        Claim("notebooks with widget state", str(state), "0", state == 0).show(),
        Claim(f"gallery pages with scripts, of {len(pages)}", str(script), "0", script == 0 and len(pages) > 1).show(),
        Claim("gallery pages with escape codes of a terminal", str(codes), "0", codes == 0).show(),
    ]


IN_CHROMIUM = {
    "first_notebook": "Lab: run, stop, compare, three runs in one chart, why on a click, the trace in Perfetto",
    "accuracy": "Lab: accuracy board stopped, resumed after a restart, a cell opened to its token; a LongBench row",
    "attention_map": "Lab: attention map zoomed to a token's text, and of a run",
    "hosts": "a page that is not Jupyter draws every widget, and loads nothing",
}


def all_tests() -> list[Claim]:
    return [
        tests("notebooks run without a browser, each in under 2 minutes", "tests/test_notebooks.py").show(),
        tests("every command and cell of the task pages works", "tests/test_docs.py").show(),
        tests("figures from a results folder, with their settings", "tests/test_workbench_published.py").show(),
        tests("rows of benchmarks, own files and models by name", "tests/test_workbench_cases.py").show(),
        tests("the board is eval: same files, stopped, resumed, watched", "tests/test_workbench_accuracy.py").show(),
        tests("the attention map's sums, tiles and bounds", "tests/test_workbench_map.py").show(),
        tests("slow drive, cold pool and wrong guesses are named", "tests/test_explain.py").show(),
        *(tests(text, "-m", "browser", f"tests/browser/test_{name}.py").show() for name, text in IN_CHROMIUM.items()),
    ]


def main(wanted: list[str]) -> int:
    parts = {
        "canvas": canvas,
        "map": attention_map,
        "cost": lambda: in_lab(slowdown),
        "traffic": lambda: in_lab(long_run, ten_minutes),
    }
    parts |= {"sizes": sizes, "tests": all_tests}
    return verdict([claim for name in wanted or parts for claim in parts[name]()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
