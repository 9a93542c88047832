"""The dashboard: configure, run, watch, stop and compare runs.

`Workbench(model, tokenizer).show()` displays it; `Workbench()` uses the embedded model.
"""

import tempfile
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path

import ipywidgets as w
from transformers import PreTrainedModel, PreTrainedTokenizerBase, logging

from hillinfer.assets import load_embedded, machine
from hillinfer.errors import UsageError
from hillinfer.longbench.job import Variant
from hillinfer.systems.registry import list_systems
from hillinfer.workbench.board import Board
from hillinfer.workbench.cases import Case
from hillinfer.workbench.compared import Compared
from hillinfer.workbench.controls import ModelControls, PromptControls, control, dropdown
from hillinfer.workbench.interrupt import current_cell, stop_on_interrupt
from hillinfer.workbench.live import LabelledRun, LiveRun
from hillinfer.workbench.observe import AttentionRecord
from hillinfer.workbench.pyramid import AttentionMap

REFRESH_HZ = 2.25  # gaps below half a second, at little cost to generation
OBSERVATION = {  # option -> (budget, exact) of the AttentionRecord
    "sampled (1 % of time)": (0.01, False),
    "every step": (None, False),
    "every step, all tokens": (None, True),
    "off": None,
}
_displayed: dict[str, "Workbench"] = {}  # by notebook cell: re-running a cell replaces its workbench


class Workbench:
    """Widgets over `LiveRun`. To control it from code, set the `value` of a control, then call `run()`.

    drive  folder of the KV file, by default the system's temporary folder; the file is deleted after each run
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        drive: str | Path | None = None,
    ):
        if (model is None) != (tokenizer is None):
            raise UsageError("pass Workbench a model and its tokenizer, or neither for the embedded model")
        name = "embedded" if model is None else Path(model.name_or_path).name or type(model).__name__
        own = (model, tokenizer) if model is not None else _without_progress_bar(load_embedded)
        self.chosen = ModelControls(*own, name, self._told)
        self.runs: list[LiveRun] = []  # runs on the boards, from left to right
        self._boards: list[Board] = []
        self._painter: threading.Thread | None = None
        self._controls(str(drive or tempfile.gettempdir()))

    @property
    def model(self) -> PreTrainedModel:
        return self.chosen.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.chosen.tokenizer

    def _controls(self, drive: str) -> None:
        self.message = w.HTML()
        self.prompt = PromptControls(self.chosen, self._told)
        self.chosen.loaded = self.prompt.model_changed
        for name in ("origin", "data", "task", "number", "tokens", "seed", "file", "text", "question", "new_tokens"):
            setattr(self, name, getattr(self.prompt, name))
        self.system = dropdown("system", list(list_systems()), "hillinfer")
        self.alpha = control(w.FloatSlider, "alpha", value=0.2, min=0.02, max=1, step=0.02, readout_format=".2f")
        self.budget = control(w.Text, "host budget", placeholder="default, or 4MiB")
        self.precision = dropdown("key codes", ["int8", "int4", "int2"], "int8")
        self.exact = dropdown("decoding", {"the system's": False, "exact: verified by all KV": True}, False)
        self.kind = dropdown("drive kind", {"an SSD": "ssd", "emulated SmartSSD": "emulated"}, "ssd")
        self.pacing = dropdown("pacing", {"unlimited": False, "a SmartSSD's rates": True}, False)
        self.folder = control(w.Text, "drive folder", value=drive)
        self.session = control(w.Text, "session file", placeholder="none, or report.kv")
        self.store = control(w.Text, "prefix store", placeholder="none, or a folder of prompts' KV")
        self.attention = dropdown("attention", list(OBSERVATION), next(iter(OBSERVATION)))
        self.run_button = w.Button(
            description="Run", button_style="primary", icon="play", tooltip="run with these settings"
        )
        self.stop_button = w.Button(
            description="Stop", icon="stop", disabled=True, tooltip="stop after the current token"
        )
        self.compare_button = w.Button(description="Compare", icon="columns", disabled=True)
        self.compare_button.tooltip = "run with these settings, next to the last run and over all compared ones"
        for button in (self.run_button, self.stop_button, self.compare_button):
            button.layout.width = "104px"
        self.compared = Compared()
        self._area = w.GridBox(layout=w.Layout(grid_gap="10px", width="100%"))
        self._area.add_class("hi-compared")
        self.run_button.on_click(lambda _: self._clicked(False))
        self.compare_button.on_click(lambda _: self._clicked(True))
        self.stop_button.on_click(lambda _: self.stop())
        for one in (self.kind, self.system):
            one.observe(lambda _: self._enable(), "value")
        self._enable()

    def _enable(self) -> None:
        """Disable the controls that do not apply."""
        self.pacing.disabled = self.kind.value != "emulated"
        if self.pacing.disabled:
            self.pacing.value = False
        for one in (self.kind, self.folder, self.budget):
            one.disabled = not self._uses_drive

    @property
    def _uses_drive(self) -> bool:
        """True if the selected system stores KV on a drive, False if in memory only."""
        return list_systems()[self.system.value].needs_drive

    def show(self) -> w.Widget:
        """The widget, for the last line of a cell. Re-running the cell stops the run of its previous workbench, if the
        front end names its cells.
        """
        if (cell := current_cell()) is not None:
            if (previous := _displayed.get(cell)) not in (None, self):
                previous.close()
            _displayed[cell] = self
        stop_on_interrupt(self)
        columns = [
            [self.chosen.box, *self.prompt.widgets, self.session, self.store],
            [self.system, self.alpha, self.precision, self.exact, self.attention],
            [self.kind, self.pacing, self.folder, self.budget],
        ]
        grid = w.GridBox(
            [w.VBox(column) for column in columns],
            layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(270px, 1fr))", grid_gap="4px 14px"),
        )
        buttons = [self.run_button, self.stop_button, self.compare_button, self.compared.button, self.message]
        if not self._boards:
            self._place([Board()])
        rows = [grid, self.prompt.preview, w.HBox(buttons), self._area, self.compared.box]
        return w.VBox(rows, layout=w.Layout(width="100%"))

    def _place(self, boards: list[Board]) -> None:
        self._boards = boards
        self._area.layout.grid_template_columns = " ".join(["minmax(0, 1fr)"] * len(boards))
        self._area.children = boards
        if len(boards) == 2:
            self._links = [w.jslink((boards[0], "cursor"), (boards[1], "cursor"))]

    def options(self) -> dict:
        """The controls as fields of `Settings`."""
        options = dict(alpha=round(self.alpha.value, 4), precision=self.precision.value)
        if self._uses_drive:
            options |= dict(drive=self.folder.value, drive_kind=self.kind.value, paced=self.pacing.value)
            options |= dict(host_budget=self.budget.value.strip() or None)
        return options

    def case(self) -> Case:
        self.chosen.check()
        return self.prompt.case()

    def open_answer(self, task: str, record: dict, data: str, variant: Variant, at: int | None = None) -> LiveRun:
        """Ask a row of an eval again, and mark the step whose token holds character `at` of the answer.

        record, data  the row as from `sources.load`, and the folder or zip it is from
        """
        if self.alive:
            raise UsageError("a run is in progress: stop it first")
        self.prompt.choose(task, record, data)
        self.system.value, self.alpha.value = variant.system, variant.alpha or 1.0
        case = Case.row(self.tokenizer, self.model.config, task, record, stepwise=variant.question == "stepwise")
        return self.start(case=case, mark=at)

    def start(self, beside: bool = False, case: Case | None = None, mark: int | None = None) -> LiveRun:
        """Start a run with the current settings in the background. `beside` keeps the last run on a second board.

        case  what is asked; None takes the controls' prompt
        mark  a character of the answer, whose step is marked in all views once the run has ended

        Raises UsageError, before anything starts, for settings that cannot run.
        """
        if self.alive:
            raise UsageError("a run is in progress: stop it first")
        observation = OBSERVATION[self.attention.value]
        record = None
        if observation:
            record = AttentionRecord(budget=observation[0], exact=observation[1], map=AttentionMap())
        session, store = (
            Path(field.value).expanduser() if field.value.strip() else None for field in (self.session, self.store)
        )
        if session and store:
            raise UsageError("a session keeps its document and a store all prompts: name one of them")
        parts = self.model, self.tokenizer, case or self.case(), self.system.value, self.options(), record, session
        run = LiveRun(*parts, store, exact=self.exact.value)
        run.check()
        self.join_painter()
        self.compared.begin(beside)
        self.runs = [*(self.runs[-1:] if beside else []), run]
        boards = self._boards[-1:] if beside else self._boards[:1]
        if len(boards) < len(self.runs):
            boards = [*boards, Board()]
        if boards != self._boards:
            self._place(boards)
        self._boards[-1].show_run(LabelledRun(run, f"{run.system}, alpha {self.alpha.value:g}", self._setting(run)))
        run.start()
        self._painter = threading.Thread(
            target=self._paint, args=(run, self._boards[-1], mark), name="hillinfer-painter"
        )
        self._painter.daemon = True
        self._painter.start()
        return run

    def run(self, beside: bool = False) -> str:
        """Run with the current settings, wait, and return the answer. Interrupting the kernel stops the run."""
        run = self.start(beside)
        try:
            return run.result()
        finally:
            self.join_painter()

    def _setting(self, run: LiveRun) -> str:
        parts = [run.case.title, self.chosen.name, f"{self.precision.value} key codes"]
        if self._uses_drive:
            kind = "emulated drive" + (", paced to a SmartSSD's rates" if self.pacing.value else "")
            kind = "SSD" if self.kind.value == "ssd" else kind
            parts += [
                f"KV on {kind} in {self.folder.value}",
                f"host budget {self.budget.value.strip() or '2*alpha of the KV'}",
            ]
        else:
            parts.append("all KV in memory")
        return "; ".join([*parts, f"measured on {machine()}"])

    def _clicked(self, beside: bool) -> None:
        try:
            self.start(beside)
        except (UsageError, OSError) as error:
            self._show_message(str(error), error=True)

    def _told(self, error: str) -> None:
        self._show_message(error, error=bool(error))

    def _show_message(self, text: str, error: bool = False) -> None:
        prefix = "<b style='color:#d55e00'>error:</b> " if error else ""
        self.message.value = f"<span role='status'>{prefix}{escape(text)}</span>"

    def _paint(self, run: LiveRun, board: Board, mark: int | None = None) -> None:
        """Body of the painter, the only thread that updates widgets during a run. The final state is always sent."""
        self._buttons(True)
        self._show_message("")
        while not run.join(1 / REFRESH_HZ):
            board.flush()
        board.flush()
        if mark is not None and (step := run.step_at(mark)) is not None:
            board.cursor = board.cursor | {"step": step}
        if run.phase == "failed":
            self._show_message(str(run.error), error=True)
        self.compared.end(self.runs)
        self._buttons(False)

    def _buttons(self, running: bool) -> None:
        self.run_button.disabled = running
        self.compare_button.disabled = running or not self.runs
        self.stop_button.disabled = not running

    @property
    def alive(self) -> bool:
        return any(run.alive for run in self.runs)

    def stop(self) -> None:
        """Stop the run after the current token."""
        for run in self.runs:
            run.stop()

    def join_painter(self) -> None:
        if self._painter is not None and self._painter is not threading.current_thread():
            self._painter.join()
            self._painter = None

    def close(self) -> None:
        """Stop and join all threads. The boards keep their content."""
        self.stop()
        self.join_painter()
        for run in self.runs:
            if run.alive:
                run.join()


def _without_progress_bar(load: Callable):
    """Call `load` without a progress bar, whose widget and thread would outlive the call."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load()
    finally:
        if enabled:
            logging.enable_progress_bar()
