"""Results folder of an eval: JSON lines and a manifest of their settings. A killed run resumes where it stopped."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

from hillinfer import files
from hillinfer.errors import UsageError

KEY = ("model", "task", "id", "system", "alpha", "question")  # identifies a result
LIBRARIES = "hillinfer torch transformers tokenizers numpy datasets rapidfuzz rouge jieba joblib dask ray".split()


class Results:
    """`results.jsonl` and `manifest.json` of one folder, locked by one process at a time. Use it in a `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: list[dict] = []

    def __enter__(self) -> "Results":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = files.plain(self.folder / "results.jsonl").open("a+b")
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.folder} ({error.strerror}); name another folder with --out"
            ) from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UsageError(f"another eval is writing to {self.folder}; wait for it, or name another --out") from None
        except OSError:
            pass  # a file system without locks
        self.file.seek(0)
        content = self.file.read()
        complete = content.rfind(b"\n") + 1  # a run killed during a write leaves a partial line
        if complete < len(content):
            self.file.truncate(complete)
        self.rows = parse(content[:complete], self.folder)
        return self

    def __exit__(self, *exc) -> None:
        self.file.close()

    def done(self) -> set[tuple]:
        """Keys of the stored results."""
        return {tuple(row[name] for name in KEY) for row in self.rows}

    def append(self, rows: list[dict]) -> None:
        """Append one sample's rows in one write, flushed to disk before returning."""
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows += rows

    def begin(self, settings: dict, models: dict[str, dict], sources: list, command: list[str], hardware: str) -> None:
        """Write the manifest. Raises UsageError if the folder's results come from other settings, models or files.

        settings  everything that affects results; must be equal for all runs of a folder
        models    maps each model to the result of `models.describe`; later runs may add models
        sources   `Source` of each task; later runs may add tasks
        hardware  the machine, in one line
        """
        path, sums = self.folder / "manifest.json", {source.task: source.sha256 for source in sources}
        old = read_manifest(self.folder) if path.exists() else {}
        for name, value in settings.items():
            if old and old["settings"].get(name) != value:
                was = old["settings"].get(name)
                raise UsageError(f"{self.folder} was made with {name} {was}, not {value}: use {was}, or another --out")
        for kind, new in (("models", models), ("tasks", sums)):
            changed = [name for name, value in new.items() if old.get(kind, {}).get(name, value) != value]
            if changed:
                raise UsageError(f"{', '.join(changed)} changed since {self.folder} was made: name another --out")
        manifest = {
            "settings": settings,
            "models": old.get("models", {}) | models,
            "tasks": old.get("tasks", {}) | sums,
            "sources": sorted({*old.get("sources", []), *map(str, sources)}),
            "runs": [
                *old.get("runs", []),
                {"started": time.strftime("%FT%TZ", time.gmtime())} | environment(command, hardware),
            ],
        }
        files.write_text(path, json.dumps(manifest, indent=1, ensure_ascii=False))


def parse(content: bytes, folder: Path) -> list[dict]:
    """Rows of a results file. Raises UsageError with the number of an invalid line."""
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            rows += [_result(json.loads(line.decode("utf-8")))] if line else []
        except (LookupError, TypeError, ValueError, RecursionError):
            raise UsageError(
                f"line {number} of {folder}/results.jsonl is not a result; remove it and run again"
            ) from None
    return rows


def _result(row: dict) -> dict:
    if not isinstance(row, dict) or any(isinstance(row[name], (dict, list)) for name in KEY):
        raise TypeError("a result is a JSON object whose key fields are scalars")
    return row


def read(folder: Path) -> list[dict]:
    """The complete rows of a folder. Another process may still be writing to it."""
    path = folder / "results.jsonl"
    if not path.is_file():
        raise UsageError(f"{folder} has no results.jsonl; name the --out folder of an eval")
    content = path.read_bytes()
    return parse(content[: content.rfind(b"\n") + 1], folder)


def read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not all(isinstance(manifest[name], kind) for name, kind in (("settings", dict), ("sources", list))):
            raise TypeError("not a manifest")
        return manifest
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        raise UsageError(f"{folder} has no readable manifest.json; name the --out folder of an eval") from None


def environment(command: list[str], hardware: str) -> dict:
    """Versions and hardware: recorded for information, never compared."""
    versions = {}
    for name in LIBRARIES:  # one by one: to read the metadata of all that is installed takes half a second
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": command,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "hardware": hardware,
        "versions": versions,
    }


def fingerprint(model: Path) -> str:
    """Short hash of a model's folder or GGUF file: name, size and first MiB of each file."""
    digest = hashlib.sha256()
    for path in sorted(model.iterdir()) if model.is_dir() else [model]:
        if path == model or (path.suffix in (".json", ".safetensors", ".model", ".jinja") and path.is_file()):
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16]
