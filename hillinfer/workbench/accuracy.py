"""The accuracy board: LongBench and its kind as a widget, over the runner and the files of `hillinfer eval`."""

import threading
import time
from pathlib import Path

import anywidget
import ipywidgets as w
import traitlets

from hillinfer.errors import UsageError
from hillinfer.longbench.job import Variant
from hillinfer.longbench.models import load_named, load_tokenizer
from hillinfer.longbench.sources import load
from hillinfer.longbench.tasks import find_task
from hillinfer.workbench.board import STATIC, standalone
from hillinfer.workbench.cases import places
from hillinfer.workbench.choices import EvalChoices
from hillinfer.workbench.evalrun import EvalRun, Watched
from hillinfer.workbench.interrupt import current_cell, stop_on_interrupt
from hillinfer.workbench.scores import answers_of, score_rows

REFRESH_S = 0.7  # between two looks at the results
_displayed: dict[str, "AccuracyBoard"] = {}  # by notebook cell


class ScoreTable(anywidget.AnyWidget):
    """The table of scores, and below it the answers to the chosen sample. static/scores.js draws both.

    rows     as from `scores.score_rows`
    state    progress of the run
    cell     what the user chose: task and number of the sample
    answers  as from `scores.answers_of`, of the chosen sample
    """

    _esm = "".join((STATIC / name).read_text(encoding="utf-8") for name in ("common.js", "scores.js"))
    _css = "".join((STATIC / name).read_text(encoding="utf-8") for name in ("board.css", "scores.css"))
    rows = traitlets.List().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    cell = traitlets.Dict().tag(sync=True)
    answers = traitlets.Dict().tag(sync=True)

    def html(self, title: str = "hillinfer") -> str:
        """A self-contained page with this table and the chosen answers. It needs neither kernel nor network."""
        traits = {name: getattr(self, name) for name in ("rows", "state", "cell", "answers")}
        return standalone(title, self._css, self._esm, {"traits": traits})


class AccuracyBoard:
    """Widgets over `EvalRun`. To control it from code, set the `value` of a control, then call `run()`.

    folder     of the results; one that holds some is shown at once, and continued with its own settings
    workbench  the dashboard that opens a token; None makes one below when it is needed
    """

    def __init__(self, folder: str | Path = "out/eval", workbench=None):
        self.workbench, self.runner, self._painter = workbench, None, None
        self.table = ScoreTable()
        self._planned, self._known, self._watched = 0, {}, None  # _known: task and place -> records by id
        self._painted = self._cost = 0.0  # when the table was made, and how long that took, seconds
        self._closing = threading.Event()
        self.choices = EvalChoices(str(folder), self._tell)
        for name in ("folder", "model", "origin", "data", "tasks", "systems", "alphas", "samples", "question", "times"):
            setattr(self, name, getattr(self.choices, name))
        self.evaluation, self.command = self.choices.evaluation, self.choices.command
        self.run_button = w.Button(description="Run", button_style="primary", icon="play", tooltip="what is missing")
        self.stop_button = w.Button(description="Stop", icon="stop", disabled=True, tooltip="stop now; Run continues")
        self.watch_button = w.ToggleButton(description="Watch", icon="eye", tooltip="an eval of another process")
        for button in (self.run_button, self.stop_button, self.watch_button):
            button.layout.width = "104px"
        self._below = w.VBox()
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.watch_button.observe(lambda change: self.watch(change.new), "value")
        self.folder.observe(lambda _: self.reload(), "value")
        self.table.observe(lambda _: self._show_answers(), "cell")
        self.table.on_msg(self._on_message)
        self.reload(adopt=True)

    def show(self) -> w.Widget:
        """The widget, for the last line of a cell."""
        if (cell := current_cell()) is not None:
            if (previous := _displayed.get(cell)) not in (None, self):
                previous.close()
            _displayed[cell] = self
        stop_on_interrupt(self)
        buttons = w.HBox([self.run_button, self.stop_button, self.watch_button])
        return w.VBox([self.choices.grid(), buttons, self.table, self._below], layout=w.Layout(width="100%"))

    def reload(self, adopt: bool = False) -> None:
        """Show the folder's results, if there are any. With `adopt` the controls take what they were made with."""
        if self.alive:
            return
        self._watched = Watched(Path(self.folder.value))
        self._watched.phase, self._planned = "kept", 0
        self._watched.poll()
        self._paint(self._watched)
        if adopt and self._watched.rows:
            try:
                self.choices.adopt(self._watched.rows)
            except UsageError as error:
                self._tell(str(error))

    def start(self) -> EvalRun | None:
        """Answer in the background what the folder lacks. None, and a message on the board, for what cannot run."""
        if self.alive:
            return None
        self.watch_button.value = False
        try:
            self.runner = EvalRun(self.evaluation(), self.command())
        except (UsageError, OSError) as error:
            return self._tell(str(error))
        self._join()
        self._closing.clear()
        self._buttons(True)
        self.runner.start()
        self._paint_by(self._follow, self.runner)
        return self.runner

    def run(self) -> list[dict]:
        """Run, wait, and return all rows of the folder. Interrupting the kernel stops the run."""
        if self.alive:
            raise UsageError("an eval is running: stop it first")
        if (runner := self.start()) is None:
            raise UsageError(self.table.state["error"])
        try:
            while not runner.join(0.2):
                pass
        except KeyboardInterrupt:
            self.stop()
            runner.join()
            raise
        finally:
            self._join()
        return runner.result()

    def watch(self, on: bool = True) -> None:
        """Follow the results that another process writes to the folder, until `watch(False)`."""
        if self.watch_button.value != on:
            self.watch_button.value = on  # calls this again
            return
        self._join()
        if on and not self.alive:
            self._watched = Watched(Path(self.folder.value))
            self._closing.clear()
            self._paint_by(self._poll)

    def _paint_by(self, work, *args) -> None:
        self._painter = threading.Thread(target=work, args=args, name="hillinfer-painter", daemon=True)
        self._painter.start()

    def _poll(self) -> None:
        while not self._closing.wait(REFRESH_S):
            if self._watched.poll() or self.table.state.get("phase") != "watching":
                self._paint(self._watched)

    def _follow(self, runner: EvalRun) -> None:
        """Body of the painter. The final state is always painted."""
        seen = -1
        while not runner.join(REFRESH_S):
            due = time.monotonic() > self._painted + 10 * self._cost  # thousands of rows take seconds to sum up
            fresh = due and len(runner.rows) != seen
            seen = len(runner.rows) if fresh else seen
            self._paint(runner, table=fresh)
        self._paint(runner)
        self._buttons(False)

    def _paint(self, source, table: bool = True) -> None:
        self._source, rows = source, list(source.rows)
        if table:
            began = time.monotonic()
            variants = len(source.evaluation.variants) if getattr(source, "total", 0) else 0
            self._planned = source.total // variants if variants else self._planned
            self.table.rows = score_rows(rows, self._planned)
            self._painted, self._cost = time.monotonic(), time.monotonic() - began
        self.table.state = source.status() | {"folder": self.folder.value, "command": self.choices.told()}

    def _tell(self, error: str) -> None:
        self.table.state = self.table.state | {"error": error}

    def _buttons(self, running: bool) -> None:
        self.run_button.disabled = self.watch_button.disabled = running
        self.stop_button.disabled = not running

    @property
    def rows(self) -> list[dict]:
        """All rows that the table sums up: of the run, or of the folder."""
        return list(self._source.rows)

    @property
    def alive(self) -> bool:
        return self.runner is not None and self.runner.alive

    def stop(self) -> None:
        """Stop now. What was answered is kept; the next run continues."""
        if self.runner is not None:
            self.runner.stop()

    def _join(self) -> None:
        self._closing.set()
        if self._painter is not None and self._painter is not threading.current_thread():
            self._painter.join()
            self._painter = None

    def close(self) -> None:
        """Stop and join all threads. The table keeps its content."""
        self.stop()
        self._join()

    def _record(self, task: str, sample: str) -> dict | None:
        """The sample from its source; None if that is out of reach."""
        if (key := (task, self.data.value)) not in self._known:
            try:
                self._known[key] = {row["_id"]: row for row in load(find_task(task), places(self.data.value))[0]}
            except UsageError:
                return None
        return self._known[key].get(sample)

    def _show_answers(self) -> None:
        same = {name: value for name, value in self.table.cell.items() if name in ("task", "model", "question")}
        rows = [row for row in self.rows if all(row[name] == value for name, value in same.items())]
        if "task" not in same or not rows:
            self.table.answers = {}
            return
        task, ids = same["task"], list(dict.fromkeys(row["id"] for row in rows))
        number = self.table.cell.get("sample", 0) % len(ids)
        record, tokenizer = self._record(task, ids[number]), load_tokenizer(rows[0]["model"])
        self.table.answers = answers_of(rows, task, ids[number], record, tokenizer) | {"number": number, "of": len(ids)}

    def _on_message(self, _, message: dict, buffers) -> None:
        if message.get("kind") == "open":
            try:
                self.open_token(message["index"])
            except (UsageError, OSError) as error:
                self._tell(str(error))

    def open_token(self, index: int):
        """Ask the chosen sample of the `index`-th answer shown again in the dashboard, and mark where it parts."""
        about = self.table.answers
        answer, record = about["answers"][index], self._record(about["task"], about["id"])
        if record is None:
            raise UsageError(f"the rows of {about['task']} are not at hand: name their folder or data.zip as data")
        if self.alive:
            raise UsageError("an eval is running: stop it first")
        if self.workbench is None:
            from hillinfer.workbench.dashboard import Workbench

            self.workbench = Workbench(*self._model(answer["model"]), drive=self.folder.value)
            self._below.children = [self.workbench.show()]
        self.workbench.chosen.use(*self._model(answer["model"]), answer["model"])
        variant = Variant(answer["system"], answer["alpha"], answer["question"])
        at = None if answer["parts"] is None else len(answer["same"])
        return self.workbench.open_answer(about["task"], record, self.data.value, variant, at)

    def _model(self, name: str):
        settings = self.evaluation().settings
        return load_named(name, settings.dtype, settings.threads, settings.seed)
