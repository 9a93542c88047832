"""The controls of the accuracy board: what is asked of which systems, as an `Evaluation` and as a command."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as w
import torch

from hillinfer.errors import UsageError
from hillinfer.longbench.job import EvalSettings
from hillinfer.longbench.plan import QUESTIONS, Evaluation, settings_of
from hillinfer.longbench.results import read_manifest
from hillinfer.longbench.tasks import bundled, find_task
from hillinfer.systems.registry import list_systems
from hillinfer.workbench.cases import OWN, SUITES, places, tasks_of
from hillinfer.workbench.controls import control, dropdown

FIDELITY = {"none": (), "on the reference": ("reference",), "on full's answer": ("own",)}


class EvalChoices:
    """Widgets for the fields of an `Evaluation`; `tell` gets the errors."""

    def __init__(self, folder: str, tell: Callable[[str], None]):
        self.tell = tell
        self.folder = control(w.Text, "results in", value=folder, continuous_update=False)
        self.model = control(w.Text, "model", value="embedded", placeholder="embedded, a folder, hub id or .gguf")
        self.origin = dropdown("tasks of", [OWN, *SUITES], OWN)
        self.data = control(w.Text, "data", placeholder="folder or data.zip; empty: the hub", continuous_update=False)
        self.tasks = control(w.SelectMultiple, "tasks", options=list(bundled()), rows=8)
        systems = [name for name in list_systems() if name != "full"]
        self.systems = control(w.SelectMultiple, "systems", options=systems, value=("streaming", "topk"), rows=8)
        self.alphas = control(w.Text, "alphas", value="0.1, 0.2")
        self.samples = control(w.BoundedIntText, "samples", value=2, min=0, max=10**6, tooltip="of each task; 0: all")
        self.question = dropdown("question", list(QUESTIONS), "stepwise")
        self.fidelity = dropdown("fidelity", FIDELITY, ("reference",))
        self.times = control(w.Dropdown, "decoding", options={"one system at a time, timed": True, "together": False})
        for one in (self.origin, self.data):
            one.observe(lambda _: self._offer_tasks(), "value")
        self._offer_tasks()

    def grid(self) -> w.Widget:
        columns = [
            [self.model, self.origin, self.data, self.folder],
            [self.tasks],
            [self.systems],
            [self.alphas, self.samples, self.question, self.fidelity, self.times],
        ]
        return w.GridBox(
            [w.VBox(column) for column in columns],
            layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(190px, 1fr))", grid_gap="4px 14px"),
        )

    def _offer_tasks(self) -> None:
        kept, own = self.tasks.value, self.origin.value == OWN
        try:
            names = list(bundled()) if own else tasks_of(self.origin.value, self.data.value)
        except (UsageError, OSError) as error:
            return self.tell(str(error))
        self.tasks.options = names
        self.tasks.value = [name for name in kept if name in names] or names[:1]

    def adopt(self, rows: Sequence[dict]) -> None:
        """Set the controls to what made the rows of the folder."""
        manifest, names = read_manifest(Path(self.folder.value)), list(dict.fromkeys(row["task"] for row in rows))
        self.model.value = ",".join(manifest["models"])
        found = [re.match(r"\S+: (folder|zip) (.*), sha256", source) for source in manifest["sources"]]
        paths = [Path(match[2]) if match[1] == "zip" else Path(match[2]).parent for match in found if match]
        self.data.value = str(paths[0]) if paths else self.data.value
        if not set(names) <= set(bundled()):
            origins = {suite: origin for origin, suite in SUITES.items()}
            self.origin.value = origins.get(find_task(names[0]).suite, OWN)
            self.tasks.options = list(dict.fromkeys([*self.tasks.options, *names]))
        self.tasks.value = names
        used = {row["system"] for row in rows if row["alpha"] is not None}
        self.systems.value = [name for name in self.systems.options if name in used] or self.systems.value
        alphas = sorted({row["alpha"] for row in rows if row["alpha"] is not None})
        self.alphas.value = ", ".join(f"{alpha:g}" for alpha in alphas) or self.alphas.value
        self.samples.value = max(len({row["id"] for row in rows if row["task"] == task}) for task in names)
        kinds = list(dict.fromkeys(row["question"] for row in rows))
        self.question.value = kinds[0] if len(kinds) == 1 else "both"
        if (kind := tuple(manifest["settings"].get("fidelity", ()))) in FIDELITY.values():
            self.fidelity.value = kind
        self.times.value = bool(manifest["settings"].get("times"))

    def evaluation(self) -> Evaluation:
        """What the controls ask for. A folder with results is continued with its own settings."""
        folder = Path(self.folder.value)
        threads = torch.get_num_threads()
        settings = EvalSettings(fidelity=self.fidelity.value, times=self.times.value, threads=threads)
        if (folder / "manifest.json").exists():
            settings = settings_of(read_manifest(folder)["settings"])
        try:
            alphas = [float(part) for part in self.alphas.value.replace(",", " ").split()]
        except ValueError:
            raise UsageError(f"'{self.alphas.value}' are no numbers: separate alphas by commas") from None
        models = [name.strip() for name in self.model.value.split(",") if name.strip()]
        if not (models and alphas and self.tasks.value):
            raise UsageError("choose a model, a task and an alpha")
        asked = models, self.tasks.value, self.systems.value, alphas, self.samples.value, self.question.value
        return Evaluation(folder, *asked, places(self.data.value), settings=settings)

    def command(self) -> list[str]:
        """The same eval for a terminal."""
        one = self.evaluation()
        words = ["hillinfer", "eval", "--model", ",".join(one.models), "--tasks", ",".join(one.tasks)]
        words += ["--systems", ",".join(one.systems), "--alpha", ",".join(f"{alpha:g}" for alpha in one.alphas)]
        words += ["--samples", str(one.samples), *(f"--data={place}" for place in one.data), "--out", str(one.folder)]
        words += ["--question", one.question] if one.question != "stepwise" else []
        words += ["--fidelity", *one.settings.fidelity] if one.settings.fidelity else []
        return words + (["--times"] if one.settings.times else []) + ["--threads", str(one.settings.threads)]

    def told(self) -> str:
        """The command in one line; empty where the controls ask for nothing."""
        try:
            return shlex.join(self.command())
        except (UsageError, OSError):
            return ""
