"""What a task is: a template, an answer's length, a metric and a few rules. LongBench's are in tasks.toml."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError
from hillinfer.longbench import synthetic

OWN = "own"  # the suite of the tasks that ship
ENGLISH = (
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum"
)
ENGLISH = [*ENGLISH.split(), "passage_count", "passage_retrieval_en", "lcc", "repobench-p"]
QUEST = "narrativeqa qasper multifieldqa_en hotpotqa gov_report triviaqa".split()  # Quest, section 4.2.3
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # NVIDIA/RULER, scripts/data/synthetic


@dataclass(frozen=True)
class Task:
    """One task; the fields from `template` on are described in tasks.toml."""

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
        """Whether official practice cuts long prompts in the middle; the others are cut only where the model ends."""
        return self.suite.startswith("longbench")

    def parts(self, record: dict) -> tuple[str, str]:
        """The prompt in two pieces: up to the end of the context, and the question."""
        head, _, tail = self.template.partition("{context}")
        if "{input}" in head:
            raise ValueError(f"the template of {self.name} puts the question before the context")
        return head + record["context"], tail.format(input=record["input"])

    def buckets(self, record: dict) -> list[str]:
        """The lengths (LongBench-E) or kinds (v2) that a record's score is also reported under."""
        if self.suite == "longbench-e":
            return ["0-4k" if record["length"] < 4000 else "4-8k" if record["length"] < 8000 else "8k+"]
        return record.get("kinds", [])


@cache
def longbench() -> dict[str, Task]:
    """LongBench v1, its E split as NAME_e, and v2, by name."""
    tables = tomllib.loads(Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8"))
    tasks = {name: Task(name, "longbench", **table) for name, table in tables.items()}
    tasks["longbench-v2"] = replace(tasks["longbench-v2"], suite="longbench-v2")
    long = {f"{name}_e": replace(task, name=f"{name}_e", suite="longbench-e") for name, task in tasks.items()}
    return tasks | {name: task for name, task in long.items() if task.e_split}


@cache
def own() -> dict[str, Task]:
    """The tasks that ship, one for each file; the question of `lines_8k` and of `lines_1k` is the same."""
    tasks = {}
    for path in sorted(data_folder("tasks").glob("*.jsonl")):
        kind = path.stem.rpartition("_")[0]
        prompt, length = synthetic.PROMPTS[kind], synthetic.MAX_NEW_TOKENS[kind]
        tasks[path.stem] = Task(path.stem, OWN, prompt, length, "exact", category=kind, chat=False)
    return tasks


def group(name: str) -> list[str] | None:
    """The tasks that a group's name stands for."""
    v1 = [task.name for task in longbench().values() if task.suite == "longbench"]
    groups = {OWN: list(own()), "longbench": v1, "longbench-en": ENGLISH, "quest": QUEST}
    return (groups | {"longbench-e": [n for n, task in longbench().items() if task.suite == "longbench-e"]}).get(name)


def find_task(name: str) -> Task:
    """The description of one task. `longeval_200` and `ruler_niah_single_1` are named after the files they are in."""
    if name in (known := longbench() | own()):
        return known[name]
    if re.fullmatch(r"longeval_\d+", name):  # LongChat's longeval/utils.py: 100 new tokens, the last number counts
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
    """Tasks of names and groups, in order and without repeats. UsageError for an unknown one."""
    names = [name for word in words for name in group(word) or [word]]
    if not names:
        raise UsageError("no task was named; give --tasks own, or longbench-en with --data FOLDER")
    return [find_task(name) for name in dict.fromkeys(names)]
