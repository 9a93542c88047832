"""Below the dashboard's boards: the last run's attention map on request, and the compared runs' figures."""

from collections.abc import Sequence

import ipywidgets as w

from hillinfer.workbench.attention import AttentionView, map_of_run
from hillinfer.workbench.differences import differences
from hillinfer.workbench.live import LiveRun
from hillinfer.workbench.overlay import RunsChart


class Compared:
    """What is shown of ended runs. `button` opens the map; `box` holds everything."""

    def __init__(self):
        self.button = w.ToggleButton(description="Attention map", icon="th", disabled=True)
        self.button.tooltip = "the last run's attention over every position of its text"
        self.button.layout.width, self.table = "144px", w.HTML()
        self.chart, self.view = RunsChart(), None
        self.run: LiveRun | None = None
        self.box = w.VBox([self.chart, self.table], layout=w.Layout(width="100%"))
        self.button.observe(lambda _: self._show_map(), "value")

    def begin(self, beside: bool) -> None:
        """A run starts: with `beside` it will be laid over those before it."""
        self.table.value, self.run, self.button.disabled = "", None, True
        if not beside:
            self.chart.clear()

    def end(self, runs: Sequence[LiveRun]) -> None:
        """Show what these runs, from left to right on the boards, have come to."""
        self.run = runs[-1]
        self.button.disabled = self.run.record is None or not self.run.record.map.steps
        if self.run.figures and self.run.counters.rows:
            self.chart.add(f"{self.run.system}, alpha {self.run.options['alpha']:g}", self.run)
        if len(runs) == 2 and all(one.figures for one in runs):
            self.table.value = differences(*runs)
        self._show_map()

    def _show_map(self) -> None:
        shown = self.button.value and not self.button.disabled
        if shown and self.view is None:
            self.view = AttentionView(*map_of_run(self.run))
        elif shown:
            self.view.show_map(*map_of_run(self.run))
        self.box.children = [*([self.view] if shown else []), self.chart, self.table]
