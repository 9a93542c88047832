"""Check and load the models of an eval."""

from functools import lru_cache
from pathlib import Path

from hillinfer import loading
from hillinfer.errors import UsageError
from hillinfer.longbench.results import fingerprint


def describe(name: str, chat: bool | None, tokens: int = 0, dtype: str = "auto") -> dict:
    """Manifest entry of a model. Raises UsageError if its config or tokenizer shows that it cannot be evaluated.

    tokens  that --max-length asks for, the answer included
    """
    from transformers import AutoConfig, AutoTokenizer

    from hillinfer.models.support import check_supported
    from hillinfer.systems.shapes import window_of

    config, tokenizer = (loading.load_pretrained(kind, name) for kind in (AutoConfig, AutoTokenizer))
    check_supported(config)
    if (window := window_of(config)) and tokens > window:
        raise UsageError(f"{tokens:,} tokens exceed the window of {name}, {window:,}: lower --max-length")
    if chat and not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {name} has no chat template; leave out --chat")
    used = bool(tokenizer.chat_template) if chat is None else chat
    path, chosen = Path(loading.model_path(name)), loading.choose_dtype(name, config, dtype)
    content = fingerprint(path) if path.exists() else "hub"
    return {"fingerprint": content, "chat": used, "dtype": str(chosen).removeprefix("torch.")}


@lru_cache(maxsize=1)
def load_model(path: str, dtype: str, threads: int, seed: int):
    """A model and its tokenizer. Cached for the next job of this process."""
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return loading.load_model(path, dtype)
