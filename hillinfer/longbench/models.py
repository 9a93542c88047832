"""Models for an eval: what they are called, whether they will do, and loading them."""

from functools import lru_cache
from pathlib import Path

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError
from hillinfer.longbench.results import fingerprint
from hillinfer.longbench.sources import hub_answers


def describe(name: str, chat: bool | None) -> dict:
    """What the manifest says of a model, after proof from its configuration that it will do. UsageError if not."""
    from transformers import AutoConfig, AutoTokenizer

    from hillinfer.seam import check_supported

    path = model_path(name)
    reach = {"local_files_only": Path(path).is_dir() or not hub_answers(), "trust_remote_code": False}
    try:
        config, tokenizer = AutoConfig.from_pretrained(path, **reach), AutoTokenizer.from_pretrained(path, **reach)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"cannot load model '{name}' ({reason}); give a folder with config.json, or a hub id in reach"
        ) from None
    check_supported(config)
    if chat and not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {name} has no chat template; leave out --chat")
    used = bool(tokenizer.chat_template) if chat is None else chat
    return {"fingerprint": fingerprint(Path(path)) if Path(path).is_dir() else "hub", "chat": used}


def model_path(name: str) -> str:
    """A folder as an absolute path, so that workers find it; a hub id as it is."""
    folder = data_folder("model") if name == "embedded" else Path(name)
    return str(folder.resolve()) if folder.is_dir() else name


@lru_cache(maxsize=1)
def load_model(path: str, dtype: str, threads: int, seed: int):
    """Model, switched to tiered attention, and tokenizer; kept for the process's next job."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from hillinfer.seam import enable

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    width = dtype if dtype == "auto" else getattr(torch, dtype)
    if path == model_path("embedded") and dtype == "auto":
        width = torch.float32  # as it was evaluated
    model = AutoModelForCausalLM.from_pretrained(path, dtype=width, trust_remote_code=False).eval()
    model = model.cuda() if torch.cuda.is_available() else model
    enable(model)
    return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
