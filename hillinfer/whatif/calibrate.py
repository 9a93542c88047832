"""The device profile of this machine: throughput of its parts, and the cost of each kind of this project's own work.

Costs come from decode steps of small random models whose shapes and contexts differ from the predicted ones. The cost
of a kind is a curve of seconds over size.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hillinfer.assets import machine
from hillinfer.systems.hillinfer.profile import THIS, Cost, Profile
from hillinfer.systems.registry import list_systems, make_cache
from hillinfer.systems.shapes import shape_of
from hillinfer.timeline import Timeline
from hillinfer.whatif import recording
from hillinfer.whatif.measure import measure_parts

CONTEXTS = (1024, 6144)
STEPS = 12


def variants(drive: Path, alpha: float = 0.1, names: Iterable[str] | None = None) -> dict[str, dict]:
    """Options of `make_cache` by the name of their costs, for every system or those in `names`.

    Systems with a drive appear twice, without and with lookahead, which changes what overlaps.
    """
    out = {}
    for name, system in list_systems().items():
        if names is None or name in names:
            out[name] = dict(system=name, alpha=alpha)
            if system.needs_drive:
                out[name] |= dict(drive=drive, lookahead=False)
                out[f"{name}+ahead"] = out[name] | dict(lookahead=True)
    return out


def random_models() -> list[PreTrainedModel]:
    """Two small random Llamas that differ in every dimension that a cost can depend on."""
    torch.manual_seed(0)
    common = dict(num_hidden_layers=3, head_dim=64, max_position_embeddings=16_384)
    small = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=128, intermediate_size=256, vocab_size=1024)
    large = dict(num_attention_heads=16, num_key_value_heads=8, hidden_size=512, intermediate_size=768, vocab_size=8192)
    return [LlamaForCausalLM(LlamaConfig(**common, **own)).eval() for own in (small, large)]


@torch.inference_mode()
def record(model: PreTrainedModel, name: str, options: dict, ids: Sequence[int], steps: int = STEPS) -> Timeline:
    """The measured timeline of `steps` decode steps after a prefill of `ids`, fed with the first of `ids`."""
    with make_cache(model, **options) as cache:
        model(torch.tensor([list(ids)], device=model.device), past_key_values=cache, logits_to_keep=1)
        cache.timeline.clear()
        cache.counters.clear()
        for token in ids[: steps + 1]:
            model(torch.tensor([[token]], device=model.device), past_key_values=cache, logits_to_keep=1)
        width = next(model.parameters()).element_size()
        cache.timeline.about = recording.describe(cache.run, shape_of(model.config, width), name)
        return cache.timeline


def samples(timeline: Timeline) -> pd.DataFrame:
    """Size and seconds of one call, by kind of work: means over the calls of a step, medians over the steps."""
    summary, calls = recording.read_summary(timeline), []
    for step in recording.decode_steps(timeline):
        if step.seconds is None:
            continue
        calls.append((step.number, "other", 0, max(0.0, step.other) / summary.shape.layers))
        for spans in step.threads.values():
            drive = [(span, recording.seconds_of(span)) for span in spans if span.kind in recording.DRIVE_COMPUTE]
            took = recording.exclusive_seconds(spans) + drive
            calls += [(step.number, span.kind, span.bytes, seconds) for span, seconds in took if span.kind != "wait"]
    sized = [(number, kind, recording.size_of(kind, size, summary), took) for number, kind, size, took in calls]
    frame = pd.DataFrame(sized, columns=["step", "kind", "size", "seconds"])
    return frame.groupby(["step", "kind"]).mean().groupby("kind").median()


def costs(timelines: Iterable[Timeline], source: str) -> dict[str, Cost]:
    """The cost of each `system.kind`, and of each kind over all systems.

    One point per model and context, the median of its runs; fitted so that a larger size never costs less.
    """
    points = []
    for timeline in timelines:
        summary = recording.read_summary(timeline)
        found = samples(timeline).reset_index().assign(shape=str(summary.shape), cached=summary.cached)
        points += [found, found.assign(kind=f"{summary.system}." + found.kind)]
    runs = pd.concat(points).groupby(["kind", "shape", "cached"]).median().query("size > 0")
    sizes = runs["size"].map(lambda size: float(f"{size:.4g}"))
    curves = runs.seconds.clip(lower=1e-9).groupby(["kind", sizes]).mean()
    return {kind: Cost(tuple(curve[kind].index), rising(curve), source) for kind, curve in curves.groupby("kind")}


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """Isotonic regression in logarithms, the nearest values that never fall, by the min-max formula."""
    logs, n = np.log(values), len(values)
    means = [[logs[a:b].mean() for b in range(a + 1, n + 1)] for a in range(n)]
    return tuple(float(np.exp(max(min(means[a][i - a :]) for a in range(i + 1)))) for i in range(n))


def calibrate(
    folder: Path,
    paced: bool = False,
    kinds: bool = True,
    each: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measure this machine; about two minutes if it is idle, half a minute without the cost of `kinds`.

    `each` is called with a description of each measurement before it starts.
    """
    each("memory, compute and drive")
    parts, timelines = measure_parts(folder, paced), []
    rng = np.random.default_rng(0)
    for model in random_models() if kinds else []:
        for name, options in variants(folder).items():
            for context in CONTEXTS:
                each(f"{name}, {context} tokens")
                timelines.append(record(model, name, options, rng.integers(3, 1000, context).tolist()))
    source = f"measured: {time.strftime('%Y-%m-%d')}, random models of two shapes"
    return Profile(THIS, machine(), parts, costs(timelines, source) if kinds else {})
