"""`hillinfer lab`: open the first notebook in JupyterLab, on loopback only and with token authentication."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError

FIRST = "00_first_run.ipynb"


def open_lab(folder: Path | None, browser: bool = True, port: int = 8888) -> None:
    """Replace this process with JupyterLab, so Ctrl-C and signals reach it directly and no process is left behind.

    folder  destination of the notebooks; None uses those of the clone or, if the package is installed, a new folder
            `hillinfer-notebooks`

    Raises UsageError if JupyterLab or the widgets are not installed.
    """
    if missing := [name for name in ("jupyterlab", "ipywidgets", "anywidget") if find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)} not installed: pip install 'hillinfer[lab]'")
    book = prepare(folder) / FIRST
    command = [sys.executable, "-m", "jupyterlab", str(book), "--ip=127.0.0.1", f"--port={port}"]
    command += [] if browser else ["--no-browser"]
    command += ["--allow-root"] if os.geteuid() == 0 else []  # in a container; the server listens on loopback only
    os.execv(sys.executable, command)


def prepare(folder: Path | None) -> Path:
    """Folder with the notebooks, copied there if missing. Existing files are never overwritten."""
    origin = data_folder("notebooks")
    if folder is None and origin.parent.name != "_data":
        return origin
    place = Path(folder or "hillinfer-notebooks").expanduser().resolve()
    place.mkdir(parents=True, exist_ok=True)
    for book in origin.glob("*.ipynb"):
        if not (place / book.name).exists():
            shutil.copy(book, place)
    return place
