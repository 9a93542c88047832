"""The dashboard: choose, run, watch, stop, compare. `Workbench(model, tokenizer).show()`; without arguments, the
embedded model.
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
from hillinfer.longbench.synthetic import TASKS
from hillinfer.systems.registry import list_systems
from hillinfer.workbench.board import Board
from hillinfer.workbench.differences import differences
from hillinfer.workbench.interrupt import stop_at_interrupt, where_shown
from hillinfer.workbench.live import Case, LiveRun
from hillinfer.workbench.observe import AttentionRecord

HZ = 2.25  # paints a second: no gap over half a second, and little taken from who generates
LOOKS = {
    "sampled (1 % of time)": (0.01, False),
    "every step": (None, False),
    "every step, all tokens": (None, True),
}
LOOKS = {**LOOKS, "off": None}
_shown: dict[str, "Workbench"] = {}  # by notebook cell: what a cell shows anew replaces what it showed


class Shown:
    """A run as a board shows it, with its setting."""

    def __init__(self, run: LiveRun, title: str, setting: str):
        self.run, self.title, self.setting = run, title, setting

    def __getattr__(self, name: str):
        return getattr(self.run, name)

    def status(self) -> dict:
        run = self.run
        extra = dict(title=self.title, setting=self.setting, right=run.right, memory=run.memory)
        return run.status() | extra | dict(looks=run.record is not None)


class Workbench:
    """Widgets over `LiveRun`. Each can be used from code too: set a control's `value`, then `run()`.

    drive  folder for the private KV file; by default one in the system's temporary folder. What is in it goes at the
           end of each run
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        drive: str | Path | None = None,
    ):
        if (model is None) != (tokenizer is None):
            raise UsageError("give Workbench a model and its tokenizer, or neither for the embedded model")
        self.model, self.tokenizer = (model, tokenizer) if model is not None else _quietly(load_embedded)
        self.name = "the embedded model" if model is None else type(self.model).__name__
        self.runs: list[LiveRun] = []  # what the boards show, from left to right
        self._boards: list[Board] = []
        self._painter: threading.Thread | None = None
        self._controls(str(drive or tempfile.gettempdir()))

    def _controls(self, drive: str) -> None:
        style = {"description_width": "92px"}

        def control(kind, text: str, **more):
            return kind(description=text, style=style, layout=w.Layout(width="auto"), **more)

        def chosen(text: str, options, value) -> w.Dropdown:
            return control(w.Dropdown, text, options=options, value=value)

        longest = getattr(self.model.config, "max_position_embeddings", 8192)
        lengths = [n for n in (1024, 2048, 4096, 8192, 16384, 32768) if n <= longest] or [longest // 2]
        self.task = chosen("task", [*TASKS, "own text"], "chain")
        self.tokens = chosen("tokens", lengths, lengths[min(1, len(lengths) - 1)])
        self.seed = control(w.BoundedIntText, "seed", value=2, min=0, max=10**6)
        self.text = control(w.Textarea, "own text", placeholder="paste a long text")
        self.question = control(w.Text, "question", placeholder="empty: continue the text")
        self.new_tokens = control(w.BoundedIntText, "new tokens", value=64, min=1, max=100_000)
        self.system = chosen("system", list(list_systems()), "hillinfer")
        self.alpha = control(w.FloatSlider, "alpha", value=0.2, min=0.02, max=1, step=0.02, readout_format=".2f")
        self.budget = control(w.Text, "host budget", placeholder="as asked, or 4MiB")
        self.precision = chosen("key codes", ["int8", "int4"], "int8")
        self.kind = chosen("drive kind", {"an SSD": "ssd", "emulated SmartSSD": "emulated"}, "ssd")
        self.pacing = chosen("pacing", {"as fast as it is": False, "a SmartSSD's rates": True}, False)
        self.folder = control(w.Text, "drive folder", value=drive)
        self.session = control(w.Text, "session file", placeholder="none, or report.kv")
        self.looks = chosen("attention", list(LOOKS), next(iter(LOOKS)))
        self.run_button = w.Button(description="Run", button_style="primary", icon="play", tooltip="run these settings")
        self.stop_button = w.Button(description="Stop", icon="stop", disabled=True, tooltip="after the token under way")
        self.compare_button = w.Button(description="Compare", icon="columns", disabled=True)
        self.compare_button.tooltip = "run these settings beside the last run"
        for button in (self.run_button, self.stop_button, self.compare_button):
            button.layout.width = "104px"
        self.message = w.HTML()
        self.table = w.HTML()
        self._area = w.GridBox(layout=w.Layout(grid_gap="10px", width="100%"))
        self.run_button.on_click(lambda _: self._clicked(False))
        self.compare_button.on_click(lambda _: self._clicked(True))
        self.stop_button.on_click(lambda _: self.stop())
        for control in (self.task, self.kind, self.system):
            control.observe(lambda _: self._enable(), "value")
        self._enable()

    def _enable(self) -> None:
        """Show what matters to the present choice, and refuse what cannot be."""
        own = self.task.value == "own text"
        for control in (self.text, self.question, self.new_tokens):
            control.layout.display = "flex" if own else "none"
        for control in (self.tokens, self.seed):
            control.layout.display = "none" if own else "flex"
        self.pacing.disabled = self.kind.value != "emulated"
        if self.pacing.disabled:
            self.pacing.value = False
        for control in (self.kind, self.folder, self.budget):
            control.disabled = not self._drives

    @property
    def _drives(self) -> bool:
        """Whether the chosen system keeps KV on a drive; the others keep all of it in memory."""
        return list_systems()[self.system.value].needs_drive

    def show(self) -> w.Widget:
        """The widget, to be the last line of a cell. Showing a cell anew ends what it ran before."""
        where = where_shown()
        if (before := _shown.get(where)) not in (None, self):
            before.close()
        _shown[where] = self
        stop_at_interrupt(self)
        columns = [
            [self.task, self.tokens, self.seed, self.text, self.question, self.new_tokens, self.session],
            [self.system, self.alpha, self.precision, self.looks],
            [self.kind, self.pacing, self.folder, self.budget],
        ]
        grid = w.GridBox(
            [w.VBox(column) for column in columns],
            layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(270px, 1fr))", grid_gap="4px 14px"),
        )
        buttons = w.HBox([self.run_button, self.stop_button, self.compare_button, self.message])
        if not self._boards:
            self._place([Board()])
        return w.VBox([grid, buttons, self._area, self.table], layout=w.Layout(width="100%"))

    def _place(self, boards: list[Board]) -> None:
        self._boards = boards
        self._area.layout.grid_template_columns = " ".join(["minmax(0, 1fr)"] * len(boards))
        self._area.children = boards
        if len(boards) == 2:
            self._links = [w.jslink((boards[0], "cursor"), (boards[1], "cursor"))]

    def options(self) -> dict:
        """Fields of `Settings` that the controls stand for."""
        options = dict(alpha=round(self.alpha.value, 4), precision=self.precision.value)
        if self._drives:
            options |= dict(drive=self.folder.value, drive_kind=self.kind.value, paced=self.pacing.value)
            options |= dict(host_budget=self.budget.value.strip() or None)
        return options

    def case(self) -> Case:
        if self.task.value == "own text":
            return Case.text(self.tokenizer, self.text.value, self.question.value, self.new_tokens.value)
        return Case.task(self.tokenizer, self.task.value, self.tokens.value, self.seed.value)

    def start(self, beside: bool = False) -> LiveRun:
        """Run the present settings in the background. `beside` keeps the last run, and shows both.

        UsageError for settings that cannot run; nothing has started then.
        """
        if self.alive:
            raise UsageError("a run is under way: stop it first")
        looks = LOOKS[self.looks.value]
        record = AttentionRecord(budget=looks[0], exact=looks[1]) if looks else None
        kept = Path(self.session.value).expanduser() if self.session.value.strip() else None
        run = LiveRun(self.model, self.tokenizer, self.case(), self.system.value, self.options(), record, kept)
        run.check()
        self.close_painter()
        self.table.value = ""
        self.runs = [*(self.runs[-1:] if beside else []), run]
        boards = self._boards[-1:] if beside else self._boards[:1]
        if len(boards) < len(self.runs):
            boards = [*boards, Board()]
        if boards != self._boards:
            self._place(boards)
        self._boards[-1].show_run(Shown(run, f"{run.system}, alpha {self.alpha.value:g}", self._setting(run)))
        run.start()
        self._painter = threading.Thread(target=self._paint, args=(run, self._boards[-1]), name="hillinfer-painter")
        self._painter.daemon = True
        self._painter.start()
        return run

    def run(self, beside: bool = False) -> str:
        """Run the present settings and wait: the answer. A kernel's interrupt stops it."""
        run = self.start(beside)
        try:
            return run.result()
        finally:
            self.close_painter()

    def _setting(self, run: LiveRun) -> str:
        parts = [run.case.title, self.name, f"{self.precision.value} key codes"]
        if self._drives:
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
            self._say(str(error), wrong=True)

    def _say(self, text: str, wrong: bool = False) -> None:
        mark = "<b style='color:#d55e00'>error:</b> " if wrong else ""
        self.message.value = f"<span role='status'>{mark}{escape(text)}</span>"

    def _paint(self, run: LiveRun, board: Board) -> None:
        """The one thread that writes to widgets while a run goes on; the last state is always sent."""
        self._buttons(True)
        self._say("")
        while not run.join(1 / HZ):
            board.flush()
        board.flush()
        if run.phase == "failed":
            self._say(str(run.error), wrong=True)
        if len(self.runs) == 2 and all(one.figures for one in self.runs):
            self.table.value = differences(*self.runs)
        self._buttons(False)

    def _buttons(self, running: bool) -> None:
        self.run_button.disabled = running
        self.compare_button.disabled = running or not self.runs
        self.stop_button.disabled = not running

    @property
    def alive(self) -> bool:
        return any(run.alive for run in self.runs)

    def stop(self) -> None:
        """End the run after the token under way."""
        for run in self.runs:
            run.stop()

    def close_painter(self) -> None:
        if self._painter is not None and self._painter is not threading.current_thread():
            self._painter.join()
            self._painter = None

    def close(self) -> None:
        """Stop and join everything. What is shown stays as it is."""
        self.stop()
        self.close_painter()
        for run in self.runs:
            if run.alive:
                run.join()


def _quietly(load: Callable):
    """Without a progress bar, whose widget and thread would outlive the loading."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load()
    finally:
        if shown:
            logging.enable_progress_bar()
