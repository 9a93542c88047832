"""Whether a run can work, from the model's config alone, before any weights are loaded."""

import shutil

import torch
from transformers import PretrainedConfig

from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.pipeline.memory import FIX, needs, refuse
from hillinfer.seam import check_supported
from hillinfer.systems.registry import run_for
from hillinfer.systems.shapes import shape_of
from hillinfer.tiers.geometry import Geometry


def context_window(config: PretrainedConfig) -> int | None:
    """The model's context window in tokens; None if its config sets no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_window(config: PretrainedConfig, tokens: int, fix: str) -> None:
    """Raise UsageError if `tokens`, prompt and answer together, exceed the context window; `fix` names the remedy."""
    if (window := context_window(config)) and tokens > window:
        raise UsageError(f"{tokens:,} tokens exceed the model's window of {window:,}: {fix}")


def plan(
    config: PretrainedConfig, settings: Settings, tokens: int, dtype: torch.dtype, chunk: int | None = None
) -> int:
    """KV bytes of `tokens` tokens of one sequence, after proof from the config alone that they can be placed.

    Raises UsageError for an unsupported family, a budget that is too small, a drive that is too full, or a run that
    needs more host memory, prefilled `chunk` tokens at once, than there is.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    run = run_for(settings)(settings, len(check_supported(config)))
    run.geometry = Geometry(1, heads, dim, dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    run.check(tokens)
    need = run.layers * tokens * run.geometry.record_bytes
    if settings.drive is not None and (free := shutil.disk_usage(settings.drive).free) < need:
        raise UsageError(f"{need:,} bytes of KV do not fit in {settings.drive}, {free:,} free; name another folder")
    shape = shape_of(text, dtype.itemsize)
    tied = shape.head_weights * shape.width if getattr(text, "tie_word_embeddings", False) else 0
    refuse(needs(run, shape, tokens, chunk, shape.weight_bytes - tied), FIX)
    return need
