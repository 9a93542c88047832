"""Where the embedded model and its tasks are: beside the package in a clone, inside it in a wheel."""

from pathlib import Path

from hillinfer.errors import UsageError


def data_folder(name: str) -> Path:
    """The folder `model`, `tasks` or `notebooks`."""
    package = Path(__file__).resolve().parent
    for base in (package / "_data", package.parent / "data", package.parent):
        if (base / name).is_dir():
            return base / name
    raise UsageError(f"the embedded {name} is not installed; work from a clone, or install the released wheel")
