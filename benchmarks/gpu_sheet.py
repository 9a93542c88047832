"""Rows of a measurement that may end at any time: each is on the disk before the next is measured."""

import contextlib
import json
import os
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Sheet:
    """Rows of JSON, each on the disk before the next is measured, within a time limit."""

    path: Path
    until: float
    failed: set[str] = field(default_factory=set)

    def left(self) -> float:
        return self.until - time.monotonic()

    def add(self, part: str, **row) -> None:
        if row.get("failed") or row.get("same") is False:
            self.failed.add(part)
        text = json.dumps({"part": part, "left": round(self.left(), 1)} | row)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def trying(self, part: str, **about):
        """Whatever fails is a row, and the rest goes on."""
        try:
            yield
        except Exception as error:
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            self.add(part, **about, failed=text, where=where)
