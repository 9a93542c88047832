"""Check and load the models of an eval."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from hillinfer import loading
from hillinfer.errors import UsageError
from hillinfer.longbench.results import fingerprint


def describe(name: str, chat: bool | None, tokens: int = 0, dtype: str = "auto", stored: bool = False) -> dict:
    """Manifest entry of a model. Raises UsageError if its config or tokenizer shows that it cannot be evaluated.

    tokens  that --max-length asks for, the answer included
    stored  its prompts are to be kept in a prefix store
    """
    from transformers import AutoConfig, AutoTokenizer

    from hillinfer.models.support import check_supported
    from hillinfer.prefix_store.keeper import check_stored
    from hillinfer.systems.shapes import window_of

    config, tokenizer = (loading.load_pretrained(kind, name) for kind in (AutoConfig, AutoTokenizer))
    (check_stored if stored else check_supported)(config)
    if (window := window_of(config)) and tokens > window:
        raise UsageError(f"{tokens:,} tokens exceed the window of {name}, {window:,}: lower --max-length")
    if chat and not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {name} has no chat template; leave out --chat")
    used = bool(tokenizer.chat_template) if chat is None else chat
    path, chosen = Path(loading.model_path(name)), loading.choose_dtype(name, config, dtype)
    content = fingerprint(path) if path.exists() else "hub"
    return {"fingerprint": content, "chat": used, "dtype": str(chosen).removeprefix("torch.")}


def load_checked(name: str, progress: Callable[[str, float], None]):
    """A model and its tokenizer as `loading.load_model` gives them, its memory checked before.

    progress  is given what is done, and the share of it, 0 to 1

    Raises UsageError before the weights are loaded if they exceed the memory that the process may use.
    """
    from transformers import AutoConfig, AutoTokenizer, utils

    from hillinfer.models.support import check_supported
    from hillinfer.pipeline.memory import AT_WORK, refuse
    from hillinfer.systems.shapes import shape_of

    progress(f"looking for {name}", 0.0)
    config, tokenizer = (loading.load_pretrained(kind, name) for kind in (AutoConfig, AutoTokenizer))
    check_supported(config)
    dtype, text = loading.choose_dtype(name, config), config.get_text_config(decoder=True)
    shape = shape_of(text, dtype.itemsize)
    tied = shape.head_weights * shape.width if getattr(text, "tie_word_embeddings", False) else 0
    weights = {"weights": shape.weight_bytes - tied, "libraries at work": AT_WORK}
    refuse(weights, "choose a smaller model, or use a machine with more")

    class Bar:
        """What transformers iterates over, such as the weights, with each step reported."""

        def __init__(self, items=(), desc: str = "", total: int | None = None, **_):
            self.items, self.what = items, desc.strip(" .") or "Loading"
            self.total = total or len(items) or 1

        def __iter__(self):
            every = max(1, self.total // 50)
            for done, item in enumerate(self.items):
                if done % every == 0:
                    progress(f"{name}: {self.what}", done / self.total)
                yield item

        def __getattr__(self, _):
            return lambda *args, **more: None

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

    set_hook = getattr(utils.logging, "set_tqdm_hook", lambda hook: None)  # releases before have none: no progress
    before = set_hook(lambda factory, args, options: Bar(*args, **options))
    progress(f"{name}: reading its files", 0.0)
    try:
        model = loading.load_weights(name, config, dtype, lambda what, share: progress(f"{name}: {what}", share))
    finally:
        set_hook(before)
    return model, tokenizer


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


def load_named(name: str, dtype: str, threads: int, seed: int):
    """`load_model` by the name in the results."""
    return load_model(loading.model_path(name), dtype, threads, seed)


@lru_cache(maxsize=4)
def load_tokenizer(name: str):
    """The tokenizer of a model; None where it is out of reach, as for results of another machine."""
    from transformers import AutoTokenizer

    try:
        return loading.load_pretrained(AutoTokenizer, name)
    except UsageError:
        return None
