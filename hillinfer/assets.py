"""Where the embedded model and its tasks are: beside the package in a clone, inside it in a wheel."""

import platform
from pathlib import Path

import torch

from hillinfer.errors import UsageError


def data_folder(name: str) -> Path:
    """The folder `model`, `tasks` or `notebooks`."""
    package = Path(__file__).resolve().parent
    for base in (package / "_data", package.parent / "data", package.parent):
        if (base / name).is_dir():
            return base / name
    raise UsageError(f"the embedded {name} is not installed; work from a clone, or install the released wheel")


def machine() -> str:
    """The machine, in one line, for every measured table."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(names)} cores of {names[0]}" if names else cpu
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {gpu}, torch {torch.__version__} with {torch.get_num_threads()} threads"
