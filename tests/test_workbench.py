"""Figures and the report show the recorded data, and escape all text."""

import re
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

from hillinfer import UsageError
from hillinfer.timeline import Counters, Hits, Timeline
from hillinfer.workbench.figures import hits_figure, systems_figure, timeline_figure, tradeoff_figure
from hillinfer.workbench.overlay import _line, show_runs
from hillinfer.workbench.report import write_report


@pytest.fixture
def timeline():
    timeline = Timeline()
    for step in range(3):
        timeline.add("cpu", "score", 0, step, 1000 * step, 1000 * step + 500, 64)
        timeline.add("drive", "read", 0, step, 1000 * step + 200, 1000 * step + 900, 4096)
    timeline.add("cpu", "something new", 0, 2, 2500, 2600)
    return timeline


def test_the_timeline_shows_the_last_steps_in_ms(timeline):
    figure = timeline_figure(timeline, steps=2)
    bars = {trace.name: trace for trace in figure.data}
    assert set(bars) == {"score", "read", "something new"}
    assert list(bars["read"].base) == pytest.approx([0.0002, 0.0012]) and list(bars["read"].y) == ["drive", "drive"]
    assert list(bars["score"].x) == pytest.approx([0.0005, 0.0005])
    other = timeline_figure(Timeline())
    assert not other.data
    alone = Timeline()
    alone.add("drive", "read", 0, 0, 0, 1)
    assert timeline_figure(alone).data[0].marker.color == bars["read"].marker.color  # one colour in all figures


def test_hits_are_shares_of_each_layer():
    counters = Counters()
    for layer, drive in ((0, 1), (1, 3)):
        counters.rows.append(Hits(0, layer, 10, 4, 4, 0, 4 - drive, drive, 1, 0, 0, 0))
    shares = [list(trace.y) for trace in hits_figure(counters).data]  # device, pool, never in the pool, demoted
    assert shares == [[0, 0], [0.75, 0.25], [0, 0.5], [0.25, 0.25]]
    [step] = zip(*(trace.y for trace in hits_figure(counters, by="step").data), strict=True)
    assert step == (0, 0.5, 0.25, 0.25)


def test_the_report_stands_alone_and_escapes(tmp_path, timeline):
    figures = [systems_figure(["full"], [0.5], 0.2, "right"), timeline_figure(timeline)]
    rows = [["<script>alert(1)</script>", "1"]]
    page = write_report(tmp_path / "new" / "r.html", "a < b", ["<i>"], ["system", "n"], rows, figures).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "a &lt; b" in page and "&lt;i&gt;" in page
    assert "cdn" not in page.split("plotly.js v")[0] and page.count("plotly-graph-div") == 2


def test_systems_on_one_point_share_a_label():
    [trace] = tradeoff_figure(["a", "b", "c"], [2**20, 2**20, 2**21], [1, 1, 0.5], "t").data
    assert list(trace.text) == ["c", "a, b"] and list(trace.x) == [2, 1] and list(trace.y) == [0.5, 1]
    [trace] = tradeoff_figure(["a", "b", "c"], [10 * 2**20, 11 * 2**20, 2**20], [1, 1, 1], "t").data
    assert list(trace.text) == ["c", "a", "<br>b"]  # near points: one label below the other


def test_runs_are_laid_over_each_other(timeline):
    counters = Counters()
    for step in range(3):
        timeline.add("cpu", "attend", 0, step, 1000 * step + 900, 1000 * step + 950)
    counters.rows += [Hits(step, 0, 10, 4, 4, 0, 4, 0, 0, 0, 0, 0) for step in range(3)]
    chart = show_runs({"one": SimpleNamespace(timeline=timeline, counters=counters)}, "read from the drive")
    chart.add("one", SimpleNamespace(timeline=timeline, counters=counters))
    assert [line["name"] for line in chart.lines] == ["one", "one (2)"] and chart.lines[0]["steps"] == 3
    assert chart.lines[0]["values"] == pytest.approx([4096 / 2**20] * 3, abs=1e-4)
    assert {"time", "read from the drive", "selected tokens"} <= {name for name, _ in chart.figures}
    assert "prefetched" not in {name for name, _ in chart.figures}  # 0 in all runs
    chart.figure = "selected tokens"
    assert chart.lines[1]["median"] == 4 and "one (2)" in chart.html("a < b")
    with pytest.raises(UsageError, match="no figure"):
        show_runs({}, "speed")
    with pytest.raises(UsageError, match="nothing to compare"):
        chart.add("none", SimpleNamespace(timeline=Timeline(), counters=Counters()))


def test_long_lines_are_means():
    line = _line("long", np.arange(2501, dtype=np.float32))
    assert line["each"] == 3 and len(line["values"]) == 834 and line["values"][:2] == [1, 4]
    assert line["values"][-1] == 2499.5 and line["median"] == 1250


@pytest.mark.parametrize("name", ["board.Board", "accuracy.ScoreTable", "attention.AttentionView", "overlay.RunsChart"])
def test_widgets_are_modules_that_stand_alone(name):
    """marimo, VS Code and Colab load them too: nothing is imported or fetched, and nothing of one host is used."""
    module, widget = name.split(".")
    code = re.sub(r"//.*", "", getattr(import_module(f"hillinfer.workbench.{module}"), widget)._esm)
    assert code.count("export default") == 1
    for word in (r"\bimport\b", r"\brequire\b", r"\bfetch\b", "jupyterapp", "Jupyter", "IPython"):
        assert not re.search(word, code), word
