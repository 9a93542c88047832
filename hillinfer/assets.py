"""The embedded model and its tasks (beside the package in a clone, inside it in a wheel), and the machine's name."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from hillinfer.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to load
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def data_folder(name: str) -> Path:
    """The folder `model`, `tasks` or `notebooks`."""
    package = Path(__file__).resolve().parent
    for base in (package / "_data", package.parent / "data", package.parent):
        if (base / name).is_dir():
            return base / name
    raise UsageError(f"the embedded {name} is not installed; work from a clone, or install the released wheel")


def load_embedded(dtype: "torch.dtype | str" = "float32") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The project's own model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data_folder("model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def cpu_info(field: str) -> list[str]:
    """What the kernel says about each core under a name such as `flags`; empty where it says nothing."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def machine() -> str:
    """CPU, GPU and torch version in one line, for the caption of a measured table."""
    import torch

    names = cpu_info("model name")
    cpu = f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {gpu}, torch {torch.__version__} with {torch.get_num_threads()} threads"
