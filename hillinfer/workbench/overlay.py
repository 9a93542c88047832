"""Several runs laid over each other in one chart, step by step. static/overlay.js draws it."""

from collections.abc import Mapping
from typing import Any

import anywidget
import numpy as np
import traitlets

from hillinfer.errors import UsageError
from hillinfer.workbench import palette
from hillinfer.workbench.board import STATIC, standalone
from hillinfer.workbench.explain import FIGURES, WORK, costs

UNITS = {"time": "ms"} | dict.fromkeys(WORK, "ms") | FIGURES  # what a chart can show
POINTS = 1000  # of a line; longer runs are shown as means of equally many steps


class RunsChart(anywidget.AnyWidget):
    """A line for each run over its decode steps, of one figure at a time: `figure`, a key of UNITS."""

    _esm = "".join((STATIC / name).read_text(encoding="utf-8") for name in ("common.js", "overlay.js"))
    _css = (STATIC / "board.css").read_text(encoding="utf-8")
    figure = traitlets.Unicode("time").tag(sync=True)
    figures = traitlets.List().tag(sync=True)  # [name, unit]
    lines = traitlets.List().tag(sync=True)
    colours = traitlets.List(list(palette.LINES)).tag(sync=True)

    def __init__(self):
        super().__init__()
        self.runs: dict[str, dict[str, np.ndarray]] = {}  # name -> figure -> its values by step
        self.observe(lambda _: self._draw(), "figure")

    def add(self, name: str, run) -> None:
        """Add an ended run, whatever has a `timeline` and `counters`; a second one of this name gets a number."""
        found = list(costs(run.timeline, run.counters).values())
        if not found:
            raise UsageError("a run without a decode step has nothing to compare")
        same = sum(other == name or other.startswith(f"{name} (") for other in self.runs)
        self.runs[f"{name} ({same + 1})" if same else name] = {
            figure: np.array([cost[figure] for cost in found], np.float32) for figure in UNITS
        }
        self._draw()

    def clear(self) -> None:
        self.runs = {}
        self._draw()

    def _draw(self) -> None:
        shown = [name for name in UNITS if any(run[name].any() for run in self.runs.values())]
        self.figures = [[name, UNITS[name]] for name in shown]
        if shown and self.figure not in shown:
            self.figure = shown[0]
        self.lines = [_line(name, run[self.figure]) for name, run in self.runs.items()]

    def html(self, title: str = "hillinfer") -> str:
        """A self-contained page with this figure of the runs. It needs neither kernel nor network."""
        traits = {name: getattr(self, name) for name in ("figure", "figures", "lines", "colours")}
        return standalone(title, self._css, self._esm, {"traits": traits})


def _line(name: str, values: np.ndarray) -> dict:
    """Means of `each` steps, so that at most POINTS are drawn; and the median of all."""
    each = -(-len(values) // POINTS)
    sums = np.add.reduceat(values, np.arange(0, len(values), each), dtype=np.float64)
    counts = np.minimum(each, len(values) - np.arange(0, len(values), each))
    means = [round(float(value), 4) for value in sums / counts]
    return {"name": name, "each": each, "steps": len(values), "values": means, "median": float(np.median(values))}


def show_runs(runs: Mapping[str, Any], figure: str = "time") -> RunsChart:
    """Two or more ended runs (`LiveRun`s or caches) by name in one chart, which offers all figures that are not 0.

    figure  shown first: `time`, `reading the drive`, `selected tokens`, ...
    """
    if figure not in UNITS:
        raise UsageError(f"no figure {figure!r}; choose from {', '.join(UNITS)}")
    chart = RunsChart()
    for name, run in runs.items():
        chart.add(name, run)
    chart.figure = figure
    return chart
