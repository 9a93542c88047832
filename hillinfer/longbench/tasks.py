"""Task definitions: prompt template, answer length, metric and rules. LongBench's tasks are in tasks.toml."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError
from hillinfer.longbench import synthetic

BUNDLED = "own"  # suite of the tasks bundled with the package
ENGLISH = (
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum"
)
ENGLISH = [*ENGLISH.split(), "passage_count", "passage_retrieval_en", "lcc", "repobench-p"]
QUEST = "narrativeqa qasper multifieldqa_en hotpotqa gov_report triviaqa".split()  # Quest, section 4.2.3
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # NVIDIA/RULER, scripts/data/synthetic


@dataclass(frozen=True)
class Task:
    """One task. The fields from `template` on are documented in tasks.toml."""

    name: str
    suite: str  # longbench, longbench-e, longbench-v2, longeval, ruler, own
    template: str
    max_new_tokens: int
    metric: str
    category: str = ""
    language: str = "en"
    chat: bool = True
    first_line: bool = False
    stop: str | None = None
    e_split: bool = False

    @property
    def truncates(self) -> bool:
        """True if the official code truncates long prompts in the middle; other suites fill the model's window."""
        return self.suite.startswith("longbench")

    def parts(self, record: dict) -> tuple[str, str]:
        """The prompt in two parts: up to the end of the context, and the question."""
        head, _, tail = self.template.partition("{context}")
        if "{input}" in head:
            raise ValueError(f"the template of {self.name} puts the question before the context")
        return head + record["context"], tail.format(input=record["input"])

    def buckets(self, record: dict) -> list[str]:
        """Additional report groups of a record: its length range (LongBench-E), or its difficulty and length (v2)."""
        if self.suite == "longbench-e":
            return ["0-4k" if record["length"] < 4000 else "4-8k" if record["length"] < 8000 else "8k+"]
        return record.get("kinds", [])


@cache
def longbench() -> dict[str, Task]:
    """Tasks of LongBench v1, its E split (as NAME_e) and v2, by name."""
    tables = tomllib.loads(Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8"))
    tasks = {name: Task(name, "longbench", **table) for name, table in tables.items()}
    tasks["longbench-v2"] = replace(tasks["longbench-v2"], suite="longbench-v2")
    long = {f"{name}_e": replace(task, name=f"{name}_e", suite="longbench-e") for name, task in tasks.items()}
    return tasks | {name: task for name, task in long.items() if task.e_split}


@cache
def bundled() -> dict[str, Task]:
    """The bundled tasks, one per file. `lines_1k` and `lines_8k` differ only in context length."""
    tasks = {}
    for path in sorted(data_folder("tasks").glob("*.jsonl")):
        kind = path.stem.rpartition("_")[0]
        prompt, length = synthetic.PROMPTS[kind], synthetic.MAX_NEW_TOKENS[kind]
        tasks[path.stem] = Task(path.stem, BUNDLED, prompt, length, "exact", category=kind, chat=False)
    return tasks


def group(name: str) -> list[str] | None:
    """Names of the tasks in a group; None if there is no such group."""
    v1 = [task.name for task in longbench().values() if task.suite == "longbench"]
    groups = {BUNDLED: list(bundled()), "longbench": v1, "longbench-en": ENGLISH, "quest": QUEST}
    return (groups | {"longbench-e": [n for n, task in longbench().items() if task.suite == "longbench-e"]}).get(name)


def find_task(name: str) -> Task:
    """Look up a task by name. LongEval and RULER tasks are named after their files: `longeval_200`, `ruler_vt`.

    Raises UsageError for an unknown name.
    """
    if name in (known := longbench() | bundled()):
        return known[name]
    if re.fullmatch(r"longeval_\d+", name):  # LongChat's longeval/utils.py: 100 new tokens, last number scored
        return Task(name, "longeval", "{context}{input}", 100, "last_number", category="lines")
    kind = name.removeprefix("ruler_").split("_")[0]
    if name.startswith("ruler_") and kind in RULER_TOKENS:
        metric = "any_of" if kind == "qa" else "share_of"
        return Task(name, "ruler", "{context}{input}", RULER_TOKENS[kind], metric, category=kind)
    raise UsageError(
        f"no task '{name}'; choose own, longbench, longbench-en, longbench-e, longbench-v2, quest, auto, "
        f"longeval_200, ruler_niah_single_1 or one of {', '.join(known)}"
    )


def find_tasks(words: Sequence[str]) -> list[Task]:
    """Tasks of the given names and groups, in order, without duplicates. Raises UsageError for an unknown name."""
    names = [name for word in words for name in group(word) or [word]]
    if not names:
        raise UsageError("no task was named; use --tasks own, or longbench-en with --data FOLDER")
    return [find_task(name) for name in dict.fromkeys(names)]
