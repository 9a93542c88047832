"""An evaluation: what `hillinfer eval` and the accuracy board of the notebooks run, into the same files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from hillinfer.assets import machine
from hillinfer.errors import UsageError
from hillinfer.loading import model_path
from hillinfer.longbench import metrics, sources, sweep
from hillinfer.longbench.job import EvalSettings, Job, Variant
from hillinfer.longbench.models import describe
from hillinfer.longbench.results import Results
from hillinfer.longbench.tasks import Task
from hillinfer.speculative import check_draft
from hillinfer.systems.registry import list_systems

QUESTIONS = {"stepwise": ["stepwise"], "prefilled": ["prefilled"], "both": ["stepwise", "prefilled"]}


@dataclass(frozen=True)
class Evaluation:
    """Every sample of the tasks, answered by every system at every alpha, for every model.

    folder    of the results; one that holds some is continued
    samples   of each task, drawn with the seed; 0 takes all
    question  of QUESTIONS
    data      folders and zips with rows, before $LONGBENCH_DIR and the hub's `revision`
    drive     folder for KV; None takes `folder`, on a cluster the workers' temporary folders

    Its properties raise UsageError for what cannot run, before any model's weights are loaded.
    """

    folder: Path
    models: Sequence[str] = ("embedded",)
    tasks: Sequence[str] = ("own",)
    systems: Sequence[str] = ("streaming", "topk", "hillinfer")
    alphas: Sequence[float] = (0.2,)
    samples: int = 4
    question: str = "stepwise"
    data: Sequence[Path] = ()
    revision: str = "main"
    settings: EvalSettings = field(default_factory=EvalSettings)
    drive: Path | None = None
    cluster: str | None = None

    @cached_property
    def variants(self) -> list[Variant]:
        if self.question not in QUESTIONS:
            raise UsageError(f"question is {', '.join(QUESTIONS)}; not {self.question}")
        options = dict(self.settings.options)
        variants = sweep.variants_of(self.systems, self.alphas, options, QUESTIONS[self.question])
        for name in {variant.system for variant in variants if self.settings.exact and variant.alpha is not None}:
            check_draft(list_systems()[name].policy)
        return variants

    @cached_property
    def loaded(self) -> list[tuple[Task, list[dict], sources.Source]]:
        loaded = sources.load_all(self.tasks, self.data, self.revision)
        metrics.check_libraries([task for task, _, _ in loaded])
        return loaded

    @cached_property
    def described(self) -> dict[str, dict]:
        """The manifest's entry of each model."""
        most, settings = self.settings.max_length, self.settings
        tokens = most + max(task.max_new_tokens for task, _, _ in self.loaded) if most else 0
        stored = settings.store is not None
        return {name: describe(name, settings.chat, tokens, settings.dtype, stored) for name in self.models}

    @cached_property
    def jobs(self) -> list[Job]:
        """One sample of each task, then the next: an early estimate of the time, and a balanced half when stopped."""
        drawn = [(task, sweep.sample(rows, self.samples, self.settings.seed)) for task, rows, _ in self.loaded]
        place = self.drive or (None if self.cluster else self.folder)  # a cluster may not have this folder
        rest = tuple(self.variants), self.settings, place and str(place.resolve())
        return [
            Job(name, model_path(name), task, records[i], *rest)
            for name in self.described
            for i in range(max(len(records) for _, records in drawn))
            for task, records in drawn
            if i < len(records)
        ]

    @contextmanager
    def opened(self, command: list[str]) -> Iterator[tuple[Results, list[Job], int]]:
        """The locked results, the jobs that are left, and the number of answers in all.

        command  as it is noted in the manifest
        """
        jobs, variants = self.jobs, self.variants  # errors come before the folder is made
        with Results(self.folder) as results:
            files, hardware = [source for _, _, source in self.loaded], machine().partition(", torch")[0]
            results.begin(self.settings.identity(), self.described, files, command, hardware)
            yield results, sweep.plan(jobs, results.done()), len(jobs) * len(variants)


def settings_of(identity: dict) -> EvalSettings:
    """The `EvalSettings` of a manifest, so that its folder is continued with the same ones."""
    values = {name: value for name, value in identity.items() if name in EvalSettings.__dataclass_fields__}
    values["options"], values["fidelity"] = tuple(values["options"].items()), tuple(values["fidelity"])
    return replace(EvalSettings(**values), exact=bool(values.get("exact")))
