"""Feasibility of a run, decided from the model's config before its weights are loaded."""

import shutil

import torch
from transformers import PretrainedConfig

from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.evaluator.policy import Policy
from hillinfer.models.support import check_selects, check_supported
from hillinfer.pipeline.memory import FIX, needs, refuse
from hillinfer.systems.registry import run_for
from hillinfer.systems.shapes import shape_of, window_of
from hillinfer.tiers.geometry import Geometry


def plan(
    config: PretrainedConfig,
    settings: Settings,
    tokens: int,
    dtype: torch.dtype,
    chunk: int | None = None,
    policy: type[Policy] | None = None,
    device: torch.device | None = None,
) -> int:
    """KV bytes of one sequence of `tokens` tokens, after checking that the run is possible.

    tokens  of the prompt and the answer together
    chunk   tokens per prefill chunk; None prefills all at once
    policy  the system's; some families cannot serve one that selects
    device  the model's; by default a GPU if there is one

    Raises UsageError for an unsupported family, a sequence longer than the model's window, a budget that is too small,
    a full drive, or a run that needs more host memory than the process may use.
    """
    support, text = check_supported(config), config.get_text_config(decoder=True)
    check_selects(support, config, policy is not None and policy.selects, settings.alpha)
    if (window := window_of(config)) and tokens > window:
        raise UsageError(f"{tokens:,} tokens exceed the model's window of {window:,}: shorten the prompt or the answer")
    shape, run = shape_of(text, dtype.itemsize), run_for(settings)(settings, len(support.tiered))
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = (1, -(-support.latents // 2)) if support.latents else (shape.kv_heads, shape.head_dim)
    run.geometry = Geometry(1, *record, dtype, device)
    run.check(tokens)
    need = run.layers * tokens * run.geometry.record_bytes
    if settings.drive is not None and (free := shutil.disk_usage(settings.drive).free) < need:
        raise UsageError(f"{need:,} bytes of KV do not fit in {settings.drive} ({free:,} free): name another folder")
    tied = shape.head_weights * shape.width if getattr(text, "tie_word_embeddings", False) else 0
    refuse(needs(run, shape, tokens, chunk, shape.weight_bytes - tied), FIX)
    return need
