"""Where rows come from: a local folder, a local data.zip, the hub's data.zip, or the tasks that ship.

Each step falls through to the next; what was used is said with its checksum. LongBench is never loaded through
`load_dataset("THUDM/LongBench")`, whose script `datasets` 4 and later refuse, nor from parquet copies, whose rows are
not the raw ones.
"""

import hashlib
import json
import os
import socket
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError
from hillinfer.longbench.tasks import OWN, Task, find_tasks

HUB = {"longbench": ("zai-org/LongBench", "data.zip"), "longbench-e": ("zai-org/LongBench", "data.zip")}
HUB["longbench-v2"] = ("zai-org/LongBench-v2", "data.json")
HOW = "name a folder or data.zip with --data or $LONGBENCH_DIR, or use the bundled tasks: --tasks own"


@dataclass(frozen=True)
class Source:
    """What a task's rows were read from."""

    task: str
    kind: str  # folder, zip, hub, bundled
    path: str
    sha256: str  # of the task's file, unzipped

    def __str__(self) -> str:
        label = " (the project's own task, no LongBench score)" if self.kind == "bundled" else ""
        return f"{self.task}: {self.kind} {self.path}, sha256 {self.sha256[:16]}{label}"


def load(task: Task, data: Sequence[Path] = (), revision: str = "main") -> tuple[list[dict], Source]:
    """A task's rows in LongBench's eight fields, and where they are from.

    data  folders and zip files, searched in this order before $LONGBENCH_DIR and the hub. Raises UsageError.
    """
    if task.suite == OWN:
        path = data_folder("tasks") / f"{task.name}.jsonl"
        found = Source(task.name, "bundled", path.name, ""), path.read_bytes()
    else:
        found = _local(task, data) or _hub(task, revision)
    source, content = found
    try:
        records = [_whole(_record(task, row)) for row in _rows(content)]
        if task.suite in ("longbench", "longbench-e"):
            records = checked(records)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{source.path} has no rows of {task.name} ({error!r}); give the official file") from None
    if not records:
        raise UsageError(f"{source.path} is empty; give the official file of {task.name}")
    return _numbered(records), replace(source, sha256=hashlib.sha256(content).hexdigest())


def load_all(
    words: Sequence[str], data: Sequence[Path] = (), revision: str = "main"
) -> list[tuple[Task, list[dict], Source]]:
    """Rows of all named tasks. The word `auto` is LongBench's English tasks where they can be had, else the bundled
    ones: the only step that replaces what was asked for, and its source says so.
    """
    if list(words) == ["auto"]:
        try:
            return load_all(["longbench-en"], data, revision)
        except UsageError:
            return load_all([OWN])
    return [(task, *load(task, data, revision)) for task in find_tasks(words)]


def checked(records: list[dict]) -> list[dict]:
    """The rows with every field of the declared type: a file whose types drift is refused and not guessed at."""
    try:
        from datasets import Dataset, Features, List, Value
    except ImportError:
        raise UsageError("LongBench's rows are checked with datasets: pip install 'hillinfer[longbench]'") from None
    texts = dict.fromkeys(("input", "context", "dataset", "language", "_id"), Value("string"))
    lists = dict.fromkeys(("answers", "all_classes"), List(Value("string")))
    return Dataset.from_list(records, features=Features(texts | {"length": Value("int64")} | lists)).to_list()


def _local(task: Task, data: Sequence[Path]) -> tuple[Source, bytes] | None:
    places = [*data, *([Path(os.environ["LONGBENCH_DIR"])] if os.environ.get("LONGBENCH_DIR") else [])]
    if lacking := [str(place) for place in places if not place.exists()]:
        raise UsageError(f"data {lacking[0]} does not exist; {HOW}")
    names = _files(task)
    for place in places:
        for name in names if place.is_dir() else ():
            if (path := place / name).is_file():
                return Source(task.name, "folder", str(path), ""), path.read_bytes()
        archive = place / "data.zip" if place.is_dir() else place
        if archive.is_file() and (content := _unzip(archive, names)) is not None:
            return Source(task.name, "zip", str(archive), ""), content
    return None


def _files(task: Task) -> list[str]:
    """Where a task's file may lie below a folder or in a zip."""
    if task.suite == "longbench-v2":
        return ["data.json", "longbench-v2.jsonl", "longbench-v2.json"]
    if task.suite == "longeval":
        return [f"{folder}{task.name.removeprefix('longeval_')}_lines.jsonl" for folder in ("", "testcases/")]
    if task.suite == "ruler":
        name = task.name.removeprefix("ruler_")
        return [f"{name}.jsonl", f"{name}/validation.jsonl", f"data/{name}/validation.jsonl"]
    return [f"{task.name}.jsonl", f"data/{task.name}.jsonl"]


def _unzip(archive: Path, names: list[str]) -> bytes | None:
    try:
        with zipfile.ZipFile(archive) as opened:
            inside = set(opened.namelist())
            return next((opened.read(name) for name in names if name in inside), None)
    except zipfile.BadZipFile:
        raise UsageError(f"{archive} is no complete zip file; download it again") from None


def _hub(task: Task, revision: str) -> tuple[Source, bytes]:
    """The official file through the hub, from its cache where the network is out of reach."""
    if task.suite not in HUB:
        raise UsageError(f"no file {' or '.join(_files(task))} for {task.name}; name its folder with --data")
    repository, name = HUB[task.suite]
    from huggingface_hub import hf_hub_download

    answers = hub_answers()
    try:
        path = hf_hub_download(repository, name, repo_type="dataset", revision=revision, local_files_only=not answers)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if answers else "no network, and not in the hub's cache"
        raise UsageError(f"{task.name} is not here, and {repository} not in reach ({reason}); {HOW}") from None
    content = _unzip(Path(path), _files(task)) if name.endswith(".zip") else Path(path).read_bytes()
    if content is None:
        raise UsageError(f"{repository}'s {name} at {revision} has no {task.name}; choose another --revision")
    return Source(task.name, "hub", f"{repository}@{revision}/{name}", ""), content


def hub_answers(wait_s: float = 3.0) -> bool:
    """Whether a download is worth trying: without this, one that cannot succeed is retried for 23 s (measured)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), wait_s).close()
        return True
    except OSError:
        return False


def _rows(content: bytes) -> list[dict]:
    text = content.decode("utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]  # texts hold other line separators


def _record(task: Task, row: dict) -> dict:
    """A row of any suite in LongBench's eight fields; v2's also has `kinds`."""
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
        context, _, question = row["input"].strip().rpartition("\n")  # the last line asks
        text = {"input": question + row.get("answer_prefix", ""), "context": context + "\n", "answers": row["outputs"]}
        return common | text | {"length": row.get("length", 0), "_id": str(row["index"])}
    names = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
    return {name: row[name] for name in names}


def _whole(record: dict) -> dict:
    """The record, if its fields are of the types that prompts and metrics take."""
    lists = [record["answers"], record["all_classes"] or [], record.get("kinds", [])]
    if not all(isinstance(own, list) for own in lists) or type(record["length"]) is not int:
        raise TypeError("answers and classes are lists, length is a whole number")
    texts = [record[name] for name in ("input", "context", "dataset", "language", "_id")]
    for text in [*texts, *(text for own in lists for text in own)]:
        text.encode()  # half a surrogate pair would fail in the tokenizer
    return record


def _numbered(records: list[dict]) -> list[dict]:
    """The same with a distinct `_id` each: a result is known by it."""
    seen: dict[str, int] = {}
    for record in records:
        seen[record["_id"]] = times = seen.get(record["_id"], 0) + 1
        if times > 1:
            record["_id"] += f"#{times}"
    return records
