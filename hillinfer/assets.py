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


def model_path(name: str) -> str:
    """The folder of `embedded` or of a local model as an absolute path; a hub id unchanged."""
    folder = data_folder("model") if name == "embedded" else Path(name)
    return str(folder.resolve()) if folder.is_dir() else name


def load_pretrained(loader, name: str, **options):
    """`loader.from_pretrained` for a folder, a hub id or `embedded`. Never runs a model's own code.

    loader   a class of transformers: AutoConfig, AutoTokenizer, AutoModelForCausalLM
    options  keyword arguments of `from_pretrained`

    Raises UsageError if the files are missing, unreachable or not of a known architecture.
    """
    try:
        return loader.from_pretrained(model_path(name), trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        fix = "give a folder with config.json, or a reachable hub id"
        raise UsageError(f"cannot load model '{name}' ({reason}); {fix}") from None


def load_embedded(dtype: "torch.dtype | str" = "float32") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The project's own model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load_pretrained(AutoModelForCausalLM, "embedded", dtype=dtype)
    return model.eval(), load_pretrained(AutoTokenizer, "embedded")


def machine() -> str:
    """CPU, GPU and torch version in one line, for the caption of a measured table."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {gpu}, torch {torch.__version__} with {torch.get_num_threads()} threads"
