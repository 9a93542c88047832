"""`hillinfer lab`: JupyterLab on the first notebook, on loopback and with its token."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError

FIRST = "00_first_run.ipynb"


def open_lab(folder: Path | None, browser: bool = True, port: int = 8888) -> None:
    """Become JupyterLab: this process goes on as it, so that Ctrl-C and signals reach it and nothing stays behind.

    folder  where the notebooks are put, if they are not there yet; None takes those of the clone, or a new folder
            `hillinfer-notebooks` where the package is installed
    """
    if missing := [name for name in ("jupyterlab", "ipywidgets", "anywidget") if find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)} not installed: pip install 'hillinfer[lab]'")
    book = prepare(folder) / FIRST
    command = [sys.executable, "-m", "jupyterlab", str(book), "--ip=127.0.0.1", f"--port={port}"]
    command += [] if browser else ["--no-browser"]
    command += ["--allow-root"] if os.geteuid() == 0 else []  # in a container; only this machine can reach it
    os.execv(sys.executable, command)


def prepare(folder: Path | None) -> Path:
    """The folder with the notebooks; those that a user has changed stay."""
    origin = data_folder("notebooks")
    if folder is None and origin.parent.name != "_data":
        return origin
    place = Path(folder or "hillinfer-notebooks").expanduser().resolve()
    place.mkdir(parents=True, exist_ok=True)
    for book in origin.glob("*.ipynb"):
        if not (place / book.name).exists():
            shutil.copy(book, place)
    return place
