"""`hillinfer lab`: JupyterLab on the first notebook, on loopback and with its token."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from hillinfer.assets import data_folder
from hillinfer.config import UsageError

FIRST = "00_first_run.ipynb"


def open_lab(folder: Path | None, browser: bool = True, port: int = 8888, voila: bool = False) -> int:
    """Start Jupyter and wait for its end; its exit code.

    folder  where the notebooks are put, if they are not there yet; None takes those of the clone, or a new folder
            `hillinfer-notebooks` where the package is installed
    voila   the dashboard alone, as a page without code
    """
    program = "voila" if voila else "jupyterlab"
    if missing := [name for name in (program, "anywidget") if find_spec(name) is None]:
        extra = "pip install voila" if missing == ["voila"] else "pip install 'hillinfer[lab]'"
        raise UsageError(f"{' and '.join(missing)} not installed; {extra}")
    place = prepare(folder)
    if voila:
        command = ["voila", str(place / FIRST), "--Voila.ip=127.0.0.1", f"--port={port}", "--token"]
        command += [] if browser else ["--no-browser"]
    else:
        command = ["jupyterlab", str(place / FIRST), "--ip=127.0.0.1", f"--port={port}"]
        command += [] if browser else ["--no-browser"]
    server = subprocess.Popen([sys.executable, "-m", *command])
    try:
        return server.wait()
    except KeyboardInterrupt:  # Jupyter got it too, and asks whether it is meant; it is
        server.terminate()
        return server.wait()


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
