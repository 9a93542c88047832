"""Write each notebook's .ipynb from its .py (the source), without outputs: `python notebooks/sync.py`."""

import hashlib
import sys
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent


def sources() -> list[Path]:
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def stripped(source: Path) -> str:
    """The notebook as it is committed: no outputs, no widget state, the same bytes each time."""
    book = jupytext.read(source)
    book.metadata.pop("jupytext", None)
    for number, cell in enumerate(book.cells):
        cell["id"] = hashlib.sha256(f"{source.stem}{number}".encode()).hexdigest()[:8]
    return nbformat.writes(book, version=4) + "\n"


def main() -> int:
    """With --check nothing is written, and the exit code says whether anything is out of step."""
    stale = [path for path in sources() if _old(path.with_suffix(".ipynb")) != stripped(path)]
    for path in stale:
        print(("out of step: " if "--check" in sys.argv else "wrote ") + path.with_suffix(".ipynb").name)
        if "--check" not in sys.argv:
            path.with_suffix(".ipynb").write_text(stripped(path))
    return int("--check" in sys.argv and bool(stale))


def _old(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
