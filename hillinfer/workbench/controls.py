"""Controls of the dashboard that choose the prompt (tasks, rows of benchmarks, own texts) and the model."""

import threading
from collections.abc import Callable
from html import escape

import ipywidgets as w
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hillinfer.documents import read_document
from hillinfer.errors import UsageError
from hillinfer.longbench.models import load_checked
from hillinfer.longbench.tasks import find_task
from hillinfer.systems.shapes import window_of
from hillinfer.workbench.cases import ORIGINS, OWN, SUITES, TEXT, Case, rows_of, tasks_of

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SHOWN = 600  # characters of a question in the preview
PREVIEW = "border-left:3px solid #0072b2;padding:2px 10px;margin:2px 0 4px;line-height:1.45;overflow-wrap:anywhere"


def control(kind, text: str, **more):
    style = {"description_width": "92px"}
    return kind(description=text, style=style, layout=w.Layout(width="auto"), **more)


def dropdown(text: str, options, value) -> w.Dropdown:
    return control(w.Dropdown, text, options=options, value=value)


class Background:
    """Runs one job at a time in a thread of its own; `tell` gets its error, or "" at the start and at a good end."""

    def __init__(self, tell: Callable[[str], None]):
        self.tell, self._thread = tell, None

    def start(self, job: Callable[[], None]) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(job,), name="hillinfer-load", daemon=True)
        self._thread.start()

    def _work(self, job: Callable[[], None]) -> None:
        self.tell("")
        try:
            job()
        except Exception as error:  # shown to the user, who waits for nothing else
            self.tell(str(error) or type(error).__name__)

    def wait(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()


class ModelControls:
    """A field for a model's name, and the model that is loaded."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, tell):
        self.model, self.tokenizer, self.name, self.loaded = model, tokenizer, name, lambda: None
        self.field = control(w.Text, "model", value=name, placeholder="embedded, a folder, hub id or .gguf")
        self.button = w.Button(
            description="Load", icon="download", tooltip="load this model", layout={"width": "84px", "flex": "0 0 auto"}
        )
        self.bar = w.FloatProgress(min=0, max=1, layout=w.Layout(width="100%", height="12px", display="none"))
        self.note = w.HTML()
        self.field.layout.flex, self.field.layout.min_width = "1 1 0", "0"
        self.background = Background(tell)
        self.button.on_click(lambda _: self.background.start(self.load))
        self.box = w.VBox([w.HBox([self.field, self.button]), self.bar, self.note])

    def load(self, name: str | None = None) -> None:
        """Load the named model, by default the one in the field, and report the progress.

        Raises UsageError before anything is loaded if it cannot be found or does not fit in memory.
        """
        name = self.field.value.strip() if name is None else name
        self.button.disabled, self.bar.layout.display, self.bar.value = True, "flex", 0
        try:
            self.use(*load_checked(name, self._progress), name)
        finally:
            self.button.disabled, self.bar.layout.display, self.note.value = False, "none", ""

    def use(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Take a model that is loaded already."""
        self.model, self.tokenizer, self.name, self.field.value = model, tokenizer, name, name
        self.loaded()

    def check(self) -> None:
        """UsageError while a model is loading, or if the field names another than the loaded one."""
        if self.background.alive:
            raise UsageError("a model is being loaded: wait for it")
        if self.field.value.strip() != self.name:
            raise UsageError(f"{self.field.value.strip() or 'no model'} is not loaded: press Load, or name {self.name}")

    def _progress(self, what: str, share: float) -> None:
        self.bar.value, self.note.value = share, f"<small role='status'>{escape(what)}: {share:.0%}</small>"


class PromptControls:
    """Where a prompt comes from: the project's own tasks, rows of a benchmark, or an own text or file."""

    def __init__(self, model: ModelControls, tell):
        self.model, self.background = model, Background(tell)
        self._rows: tuple[tuple, list[dict], str] = ((), [], "")  # task and place, their rows, the source in words
        self.origin = dropdown("prompt", ORIGINS, OWN)
        self.task = dropdown("task", tasks_of(OWN), "chain")
        self.tokens = dropdown("tokens", LENGTHS, LENGTHS[1])
        self.seed = control(w.BoundedIntText, "seed", value=2, min=0, max=10**6)
        self.data = control(w.Text, "data", placeholder="folder or data.zip; empty: the hub", continuous_update=False)
        self.number = control(w.BoundedIntText, "row", value=1, min=1, max=10**6)
        self.preview = w.HTML()
        self.file = control(w.Text, "file", placeholder="report.pdf, .md or .txt; or paste below")
        self.text = control(w.Textarea, "own text", placeholder="paste a long text")
        self.question = control(w.Text, "question", placeholder="empty: continue the text")
        self.new_tokens = control(w.BoundedIntText, "new tokens", value=64, min=1, max=100_000)
        self.widgets = [self.origin, self.data, self.task, self.number, self.tokens, self.seed]
        self.widgets += [self.file, self.text, self.question, self.new_tokens]
        self.origin.observe(lambda _: self._origin_changed(), "value")
        self.data.observe(lambda _: self._origin_changed(), "value")
        self.task.observe(lambda _: self._task_changed(), "value")
        self.number.observe(lambda _: self.background.start(self._show_row), "value")
        self.model_changed()
        self._show_controls()

    def model_changed(self) -> None:
        """Offer the lengths that the model's window takes, and count the row's tokens anew."""
        longest = window_of(self.model.model.config) or 8192
        self.tokens.options = [n for n in LENGTHS if n <= longest] or [longest // 2]
        self.tokens.value = self.tokens.options[min(1, len(self.tokens.options) - 1)]
        if self._from_rows and self._rows[1]:
            self._show_row()

    @property
    def _from_rows(self) -> bool:
        return self.origin.value not in (OWN, TEXT)

    def _show_controls(self) -> None:
        own, text = self.origin.value == OWN, self.origin.value == TEXT
        shown = {self.tokens: own, self.seed: own, self.task: not text}
        shown |= dict.fromkeys((self.data, self.number, self.preview), self._from_rows)
        shown |= dict.fromkeys((self.file, self.text, self.question, self.new_tokens), text)
        for one, on in shown.items():
            one.layout.display = "flex" if on else "none"

    def _origin_changed(self) -> None:
        self._show_controls()
        if self.origin.value == TEXT:
            return
        try:
            names = tasks_of(self.origin.value, self.data.value)
        except (UsageError, OSError) as error:
            return self.background.start(lambda error=error: self._refuse(error))
        kept = self.task.value
        self.task.options = names  # selects the first
        if kept in names:
            self.task.value = kept
        if self._from_rows:
            self._task_changed()

    def _refuse(self, error: Exception) -> None:
        raise error

    def _task_changed(self) -> None:
        if self._from_rows:
            self.background.start(self._show_row)

    def rows(self) -> list[dict]:
        """The rows of the chosen task; UsageError if there are none."""
        if self.task.value is None:
            raise UsageError(f"no task of {self.origin.value} there: name the folder of its .jsonl files as data")
        if self._rows[0] != (key := (self.task.value, self.data.value)):
            self.preview.value = "<small role='status'>looking for the rows ...</small>"
            try:
                self._rows = key, *rows_of(*key)
            finally:
                self.preview.value = ""
        self.number.max = max(1, len(self._rows[1]))
        return self._rows[1]

    def _show_row(self) -> None:
        rows, case = self.rows(), self._row_case()
        record, answers = case.record, " | ".join(case.record["answers"])
        question = record["input"].strip() or "(the task's own instruction: see its prompt)"
        unit = "characters" if record["language"] == "zh" else "words"
        tokens = f"{len(case.context) + len(case.question):,} tokens"
        tokens += f", truncated in the middle from {case.shortened:,}" if case.shortened else ""
        facts = f"row {self.number.value} of {len(rows):,}; {record['length']:,} {unit}, {tokens}"
        parts = {"question": question, "reference": answers, "length": facts, "source": self._rows[2]}
        lines = [f"<b>{name}</b> {escape(_short(text))}" for name, text in parts.items()]
        self.preview.value = f"<div class='hi-row' style='{PREVIEW}'>{'<br>'.join(lines)}</div>"

    def choose(self, task: str, record: dict, data: str) -> None:
        """Set the controls to a row; not to one of the bundled tasks, which they do not offer."""
        origin = {suite: name for name, suite in SUITES.items()}.get(find_task(task).suite)
        if origin is not None:
            self.data.value, self.origin.value, self.task.value = data, origin, task
            self.background.wait()
            self.number.value = 1 + [row["_id"] for row in self.rows()].index(record["_id"])

    def _row_case(self) -> Case:
        rows, model = self.rows(), self.model
        number = min(self.number.value, len(rows))
        return Case.row(model.tokenizer, model.model.config, self.task.value, rows[number - 1], number)

    def case(self) -> Case:
        """The chosen prompt. UsageError if there is none."""
        self.background.wait()
        if self.origin.value == OWN:
            return Case.task(self.model.tokenizer, self.task.value, self.tokens.value, self.seed.value)
        if self._from_rows:
            return self._row_case()
        text = read_document(self.file.value.strip()) if self.file.value.strip() else self.text.value
        return Case.text(self.model.tokenizer, text, self.question.value, self.new_tokens.value)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."
