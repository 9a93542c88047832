"""An eval in a background thread, which can be watched live and stopped within one token. Independent of widgets."""

import threading
import time
from pathlib import Path

import torch

from hillinfer.errors import UsageError
from hillinfer.longbench.job import answer_groups
from hillinfer.longbench.models import load_model
from hillinfer.longbench.plan import Evaluation
from hillinfer.longbench.results import read
from hillinfer.workbench.background import Background


class Stopped(Exception):
    """Ends an answer in the middle: what it had computed is not kept."""


class EvalRun(Background):
    """Answers what an `Evaluation` lacks, in a thread; every group of answers is on disk before the next begins.

    Other threads may read rows, phase, total, kept and status() meanwhile.
    """

    thread_name = "hillinfer-eval"

    def __init__(self, evaluation: Evaluation, command: list[str]):
        super().__init__()
        self.evaluation, self.command = evaluation, command
        self.phase = "waiting"  # preparing, answering, done, stopped, failed
        self.rows: list[dict] = []
        self.total = self.kept = 0  # answers asked for; those of them that were there before
        self.new = 0  # answers of this run
        self.doing = ""  # the sample that is being answered
        self._began = 0.0

    def _outcome(self) -> list[dict]:
        """All rows of the folder."""
        return self.rows

    def status(self) -> dict:
        """Progress, and an estimate of the seconds left from the answers of this run."""
        took, done = time.perf_counter() - self._began if self._began else 0.0, self.kept + self.new
        left = took / self.new * (self.total - done) if self.new and self.phase == "answering" else None
        known = dict(phase=self.phase, done=done, total=self.total, kept=self.kept, doing=self.doing)
        return known | dict(left_s=left, error=str(self.error or ""))

    def _work(self) -> None:
        try:
            self.phase = "preparing"
            with self.evaluation.opened(self.command) as (results, left, total):
                self.rows, self.total = results.rows, total
                self.kept = total - sum(len(job.variants) for job in left)
                for job in left:
                    self._answer(job, results)
            self.phase = "done"
        except Stopped:
            self.phase = "stopped"
        except BaseException as error:
            self.error, self.phase = error, "failed"
        finally:
            self.doing = ""

    def _answer(self, job, results) -> None:
        settings = job.settings
        self._check()
        self.doing = f"loading {job.model}"
        model, _ = load_model(job.path, settings.dtype, settings.threads, settings.seed)  # kept for the job
        layers = [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]
        hooks = [part.register_forward_pre_hook(self._check) for part in (model, *layers)]
        self._began = self._began or time.perf_counter()
        self.phase, self.doing = "answering", f"{job.task.name}, {job.record['_id']}"
        try:
            for rows in answer_groups(job):
                results.append(rows)
                self.new += len(rows)
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, *_) -> None:
        if self._stop.is_set() and threading.current_thread() is self._thread:
            raise Stopped


class Watched:
    """The results that another process writes to a folder; reads them anew when the file has grown."""

    def __init__(self, folder: Path):
        self.folder, self.rows, self.phase, self._size = folder, [], "watching", -1

    def poll(self) -> bool:
        """True if there are new rows. A folder without results has none yet."""
        try:
            size = (self.folder / "results.jsonl").stat().st_size
            if size == self._size:
                return False
            self._size, self.rows = size, read(self.folder)
        except (OSError, UsageError):
            return False
        return True

    def status(self) -> dict:
        return dict(phase=self.phase, done=len(self.rows), total=0, kept=0, doing="", left_s=None, error="")
