"""Prompts of runs: the project's own tasks, rows of LongBench, LongEval and RULER, and own texts or files."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hillinfer.errors import UsageError
from hillinfer.longbench import metrics
from hillinfer.longbench.job import prompt_of
from hillinfer.longbench.prompts import turn
from hillinfer.longbench.runner import stop_rules, synthetic_prompt
from hillinfer.longbench.sources import load, local_tasks
from hillinfer.longbench.synthetic import TASKS, make_records
from hillinfer.longbench.tasks import Task, find_task, longbench

OWN, TEXT = "the project's own", "own text or file"
SUITES = {"LongBench": "longbench", "LongBench-E": "longbench-e", "LongEval": "longeval", "RULER": "ruler"}
ORIGINS = (OWN, *SUITES, TEXT)  # where a prompt comes from


@dataclass(frozen=True)
class Case:
    """Prompt of a run: token ids of a document and of a question about it, and the maximum answer length."""

    title: str
    context: list[int]
    question: list[int]
    max_new_tokens: int
    record: dict | None = None  # with the reference answers
    judge: Task | None = None  # the task whose metric scores an answer to the record
    shortened: int = 0  # tokens of the prompt before it was truncated to the model's window; 0 if it was not

    @classmethod
    def task(cls, tokenizer: PreTrainedTokenizerBase, task: str, tokens: int, seed: int) -> "Case":
        """A synthetic task with a document of about `tokens` tokens; `seed` determines document and question."""
        record = make_records(task, tokens, 1, seed)[0]
        about, prompt = synthetic_prompt(tokenizer, record)
        context, question = prompt.ids[: prompt.document], prompt.ids[prompt.document :]
        title = f"{task}, {len(context):,} tokens, seed {seed}"
        return cls(title, context, question, about.max_new_tokens, record, about)

    @classmethod
    def row(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config,
        task: str,
        record: dict,
        number: int = 0,
        stepwise: bool = True,
    ) -> "Case":
        """A row of LongBench, LongEval or RULER with its official prompt, truncated to the window of `config`.

        record    as from `sources.load`
        number    of the row in its file, from 1; only for the title
        stepwise  feed the question token by token; otherwise it is prefilled with the document
        """
        about = find_task(task)
        prompt = prompt_of(about, record, config, tokenizer)
        end = prompt.document if stepwise else len(prompt.ids) - 1
        context, question = prompt.ids[:end], prompt.ids[end:]
        title = f"{task}, row {number or record['_id']}, {len(prompt.ids):,} tokens"
        title += f" of {prompt.original:,}" if prompt.truncated else ""
        short = prompt.original if prompt.truncated else 0
        return cls(title, context, question, about.max_new_tokens, record, about, short)

    @classmethod
    def text(cls, tokenizer: PreTrainedTokenizerBase, text: str, question: str, max_new_tokens: int) -> "Case":
        """A custom text with a question about it; without a question, the text is continued.

        Raises UsageError if the text is empty or too short.
        """
        if not text.strip():
            raise UsageError("there is no text: paste one or name a file, or choose a task")
        if question.strip():
            context, question_ids = turn(tokenizer, text, question)
        else:
            ids = tokenizer(text).input_ids
            context, question_ids = ids[:-1], ids[-1:]
        if not context or not question_ids:
            raise UsageError("the text is only one token long: use a longer one")
        return cls(f"own text, {len(context):,} tokens", context, question_ids, max_new_tokens)

    def score(self, answer: str) -> float | None:
        """The task's score of an answer, 0 to 1; None for an own text."""
        if self.judge is None or self.record is None:
            return None
        return metrics.score(self.judge, answer, self.record["answers"], self.record["all_classes"])

    def rules(self, tokenizer: PreTrainedTokenizerBase) -> dict:
        """Arguments of `generate` for the task's end of an answer."""
        return stop_rules(self.judge, tokenizer, len(self.context) + len(self.question)) if self.judge else {}


def tasks_of(origin: str, data: str = "") -> list[str]:
    """Names of the tasks of one of ORIGINS. LongEval and RULER have those that have a file in the folder `data`."""
    if origin == OWN:
        return list(TASKS)
    if origin in ("LongBench", "LongBench-E"):
        return [name for name, task in longbench().items() if task.suite == SUITES[origin]]
    return local_tasks(SUITES[origin], places(data)) if origin in SUITES else []


def places(data: str) -> list[Path]:
    return [Path(data.strip()).expanduser()] if data.strip() else []


def rows_of(task: str, data: str = "") -> tuple[list[dict], str]:
    """The rows of a task, and where they come from: folder or data.zip, else $LONGBENCH_DIR, else the hub.

    Raises UsageError if no source has them, or a library of the task's metric is missing.
    """
    metrics.check_libraries([find_task(task)])
    records, source = load(find_task(task), places(data))
    return records, str(source)
