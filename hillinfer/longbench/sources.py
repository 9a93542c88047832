"""Load task records from a local folder, a local data.zip, the Hub's data.zip, or the bundled tasks.

Sources are tried in that order, and the one used is reported with its checksum. Neither
`load_dataset("THUDM/LongBench")` nor parquet copies are used: `datasets` 4 and later refuse its loading script, and the
copies do not contain the raw rows.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError
from hillinfer.loading import hub_reachable
from hillinfer.longbench.tasks import BUNDLED, RULER_TOKENS, Task, find_tasks

HUB = {"longbench": ("zai-org/LongBench", "data.zip"), "longbench-e": ("zai-org/LongBench", "data.zip")}
HUB["longbench-v2"] = ("zai-org/LongBench-v2", "data.json")
HINT = "name a folder or data.zip with --data or $LONGBENCH_DIR, or use the bundled tasks: --tasks own"


@dataclass(frozen=True)
class Source:
    """Origin of a task's records."""

    task: str
    kind: str  # folder, zip, hub, bundled
    path: str
    sha256: str  # of the task's file, unzipped

    def __str__(self) -> str:
        label = " (the project's own task, not a LongBench score)" if self.kind == "bundled" else ""
        return f"{self.task}: {self.kind} {self.path}, sha256 {self.sha256[:16]}{label}"


def load(task: Task, data: Sequence[Path] = (), revision: str = "main") -> tuple[list[dict], Source]:
    """A task's records in LongBench's eight fields, and their source.

    data  folders and zip files, searched in order before $LONGBENCH_DIR and the Hub

    Raises UsageError if no source has the task, or its file is empty or malformed.
    """
    if task.suite == BUNDLED:
        path = data_folder("tasks") / f"{task.name}.jsonl"
        found = Source(task.name, "bundled", path.name, ""), path.read_bytes()
    else:
        found = _local(task, data) or _hub(task, revision)
    source, content = found
    try:
        records = [_validated(_record(task, row)) for row in _rows(content)]
        if task.suite in ("longbench", "longbench-e"):
            records = checked(records)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        if isinstance(error, UnicodeError):  # its repr would hold the whole file
            raise UsageError(
                f"{source.path} is no UTF-8 text ({error}); convert it, or use the official file"
            ) from None
        reason = repr(error)[:200]
        raise UsageError(f"{source.path} has no rows of {task.name} ({reason}); use the official file") from None
    if not records:
        raise UsageError(f"{source.path} is empty; use the official file of {task.name}")
    return _with_unique_ids(records), replace(source, sha256=hashlib.sha256(content).hexdigest())


def load_all(
    words: Sequence[str], data: Sequence[Path] = (), revision: str = "main"
) -> list[tuple[Task, list[dict], Source]]:
    """Records of all named tasks. `auto` means LongBench's English tasks if available, else the bundled tasks.

    `auto` is the only fallback to other tasks than those requested, and the source reports it.
    """
    if list(words) == ["auto"]:
        try:
            return load_all(["longbench-en"], data, revision)
        except UsageError:
            return load_all([BUNDLED])
    return [(task, *load(task, data, revision)) for task in find_tasks(words)]


def checked(records: list[dict]) -> list[dict]:
    """The records with every field cast to its declared type. Files with other types are rejected."""
    try:
        from datasets import Dataset, Features, List, Value
    except ImportError:
        raise UsageError("checking LongBench's rows needs datasets: pip install 'hillinfer[longbench]'") from None
    texts = dict.fromkeys(("input", "context", "dataset", "language", "_id"), Value("string"))
    lists = dict.fromkeys(("answers", "all_classes"), List(Value("string")))
    return Dataset.from_list(records, features=Features(texts | {"length": Value("int64")} | lists)).to_list()


def _local(task: Task, data: Sequence[Path]) -> tuple[Source, bytes] | None:
    names = _files(task)
    for place in _places(data):
        for name in names if place.is_dir() else ():
            if (path := place / name).is_file():
                return Source(task.name, "folder", str(path), ""), path.read_bytes()
        archive = place / "data.zip" if place.is_dir() else place
        if archive.is_file() and (content := _unzip(archive, names)) is not None:
            return Source(task.name, "zip", str(archive), ""), content
    return None


def _files(task: Task) -> list[str]:
    """Possible paths of a task's file in a folder or zip archive."""
    if task.suite == "longbench-v2":
        return ["data.json", "longbench-v2.jsonl", "longbench-v2.json"]
    if task.suite == "longeval":
        return [f"{folder}{task.name.removeprefix('longeval_')}_lines.jsonl" for folder in ("", "testcases/")]
    if task.suite == "ruler":
        name = task.name.removeprefix("ruler_")
        return [f"{name}.jsonl", f"{name}/validation.jsonl", f"data/{name}/validation.jsonl"]
    return [f"{task.name}.jsonl", f"data/{task.name}.jsonl"]


def local_tasks(suite: str, data: Sequence[Path] = ()) -> list[str]:
    """Names of the tasks of LongEval or RULER, whose tasks are named after files, in folders and zips (searched as by
    `load`). Numbers in names sort by value.
    """
    paths = []
    for place in _places(data):
        if place.is_dir():
            paths += [path.relative_to(place).as_posix() for path in place.rglob("*.jsonl")]
        elif place.is_file():
            with zipfile.ZipFile(place) as opened:
                paths += opened.namelist()
    pattern, name = {
        "longeval": (r"(?:testcases/)?(\d+)_lines\.jsonl", "longeval_{}"),
        "ruler": (rf"(?:data/)?((?:{'|'.join(RULER_TOKENS)})\w*)(?:/validation)?\.jsonl", "ruler_{}"),
    }[suite]
    found = {name.format(match[1]) for path in paths if (match := re.fullmatch(pattern, path))}
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _places(data: Sequence[Path]) -> list[Path]:
    """Where to look for files, in order. UsageError if one of them does not exist."""
    places = [*data, *([Path(os.environ["LONGBENCH_DIR"])] if os.environ.get("LONGBENCH_DIR") else [])]
    if missing := [str(place) for place in places if not place.exists()]:
        raise UsageError(f"data {missing[0]} does not exist; {HINT}")
    return places


def _unzip(archive: Path, names: list[str]) -> bytes | None:
    try:
        with zipfile.ZipFile(archive) as opened:
            inside = set(opened.namelist())
            return next((opened.read(name) for name in names if name in inside), None)
    except zipfile.BadZipFile:
        raise UsageError(f"{archive} is not a complete zip file; download it again") from None


def _hub(task: Task, revision: str) -> tuple[Source, bytes]:
    """The official file from the Hub, or from its local cache without a network."""
    if task.suite not in HUB:
        raise UsageError(f"no file {' or '.join(_files(task))} for {task.name}; name its folder with --data")
    repository, name = HUB[task.suite]
    from huggingface_hub import hf_hub_download

    online = hub_reachable()
    try:
        path = hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_files_only=not online)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if online else "no network, and not in the Hub's cache"
        raise UsageError(f"{task.name} was not found, and {repository} is out of reach ({reason}); {HINT}") from None
    content = _unzip(Path(path), _files(task)) if name.endswith(".zip") else Path(path).read_bytes()
    if content is None:
        raise UsageError(f"{repository}'s {name} at {revision} has no {task.name}; choose another --revision")
    return Source(task.name, "hub", f"{repository}@{revision}/{name}", ""), content


def _rows(content: bytes) -> list[dict]:
    text = content.decode("utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]  # texts contain other line separators


def _record(task: Task, row: dict) -> dict:
    """A row of any suite, converted to LongBench's eight fields; v2 adds `kinds`."""
    common = {"dataset": task.name, "language": "en", "all_classes": None}
    if task.suite == "longbench-v2":
        choices = "\n".join(f"({letter}) {row['choice_' + letter].strip()}" for letter in "ABCD")
        question = f"What is the correct answer to this question: {row['question'].strip()}\nChoices:\n{choices}"
        text = {"input": question, "context": row["context"].strip(), "answers": [row["answer"]]}
        return common | text | {"length": 0, "_id": row["_id"], "kinds": [row["difficulty"], row["length"]]}
    if task.suite == "longeval":
        cut = row["prompt"].rindex("Now the record is over.")
        text = {"input": row["prompt"][cut:], "context": row["prompt"][:cut], "answers": [str(row["expected_number"])]}
        return common | text | {"length": len(row["prompt"].split()), "_id": "-".join(map(str, row["random_idx"]))}
    if task.suite == "ruler":
        context, _, question = row["input"].strip().rpartition("\n")  # the last line is the question
        text = {"input": question + row.get("answer_prefix", ""), "context": context + "\n", "answers": row["outputs"]}
        return common | text | {"length": row.get("length", 0), "_id": str(row["index"])}
    names = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
    return {name: row[name] for name in names}


def _validated(record: dict) -> dict:
    """The record unchanged, after a check of its field types."""
    lists = [record["answers"], record["all_classes"] or [], record.get("kinds", [])]
    if not all(isinstance(values, list) for values in lists) or type(record["length"]) is not int:
        raise TypeError("answers and classes must be lists, length must be an integer")
    texts = [record[name] for name in ("input", "context", "dataset", "language", "_id")]
    for text in [*texts, *(text for values in lists for text in values)]:
        text.encode()  # an unpaired surrogate would fail in the tokenizer
    return record


def _with_unique_ids(records: list[dict]) -> list[dict]:
    """The records with unique `_id`s, which identify results."""
    seen: dict[str, int] = {}
    for record in records:
        seen[record["_id"]] = times = seen.get(record["_id"], 0) + 1
        if times > 1:
            record["_id"] += f"#{times}"
    return records
