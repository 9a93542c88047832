"""Check and load the models of an eval."""

from functools import lru_cache
from pathlib import Path

from hillinfer.assets import load_pretrained, model_path
from hillinfer.errors import UsageError
from hillinfer.longbench.results import fingerprint
from hillinfer.longbench.sources import hub_reachable


def describe(name: str, chat: bool | None) -> dict:
    """Manifest entry of a model. Raises UsageError if its config or tokenizer shows that it cannot be evaluated."""
    from transformers import AutoConfig, AutoTokenizer

    from hillinfer.models.support import check_supported

    path = model_path(name)
    offline = Path(path).is_dir() or not hub_reachable()
    config, tokenizer = (load_pretrained(kind, name, local_files_only=offline) for kind in (AutoConfig, AutoTokenizer))
    check_supported(config)
    if chat and not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {name} has no chat template; leave out --chat")
    used = bool(tokenizer.chat_template) if chat is None else chat
    return {"fingerprint": fingerprint(Path(path)) if Path(path).is_dir() else "hub", "chat": used}


@lru_cache(maxsize=1)
def load_model(path: str, dtype: str, threads: int, seed: int):
    """Model with tiered attention enabled, and its tokenizer. Cached for the next job of this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from hillinfer.seam import enable

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    if path == model_path("embedded") and dtype == "auto":
        precision = torch.float32  # the dtype of its published evaluation
    model = load_pretrained(AutoModelForCausalLM, path, dtype=precision).eval()
    model = model.cuda() if torch.cuda.is_available() else model
    enable(model)
    return model, load_pretrained(AutoTokenizer, path)
