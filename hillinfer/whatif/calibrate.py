"""The device profile of this machine: what its parts do, and what each kind of this project's own work costs on it.

The costs come from decode steps of small random models, of other shapes and contexts than what is to be predicted; each
kind is a curve of its seconds over its size.
"""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hillinfer.assets import machine
from hillinfer.seam import disable, enable
from hillinfer.systems.registry import list_systems, make_cache
from hillinfer.systems.shapes import shape_of
from hillinfer.tiers.block_file import MAX_READ, BlockFile, aligned
from hillinfer.timeline import Timeline
from hillinfer.whatif.devices import THIS, Cost, Profile, Rate
from hillinfer.whatif.recording import BESIDE, decode_steps, describe, own_seconds, recorded, size_of

CONTEXTS = (1024, 6144)
STEPS = 12
BLOCKS = tuple(1 << bits for bits in (12, 14, 16, 18, 20, 24, 27))  # bytes of a piece: 4 KiB to 128 MiB


@dataclass(frozen=True)
class Way:
    """A system with options, under the name that its costs are kept by."""

    name: str
    system: str
    options: dict = field(default_factory=dict)


def ways(drive: Path, alpha: float = 0.1, names: Iterable[str] | None = None) -> list[Way]:
    """Every system; those that need a drive without and with lookahead, as that changes what runs at once."""
    out = []
    for name, system in list_systems().items():
        if names is not None and name not in names:
            continue
        if not system.needs_drive:
            out.append(Way(name, name, {"alpha": alpha}))
            continue
        for suffix, ahead in (("", False), ("+ahead", True)):
            out.append(Way(name + suffix, name, {"alpha": alpha, "drive": drive, "lookahead": ahead}))
    return out


def random_models() -> list[PreTrainedModel]:
    """Two small random Llamas that differ in every dimension a cost can depend on."""
    torch.manual_seed(0)
    common = dict(num_hidden_layers=3, head_dim=64, max_position_embeddings=16_384)
    small = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=128, intermediate_size=256, vocab_size=1024)
    large = dict(num_attention_heads=16, num_key_value_heads=8, hidden_size=512, intermediate_size=768, vocab_size=8192)
    return [LlamaForCausalLM(LlamaConfig(**common, **own)).eval() for own in (small, large)]


@torch.inference_mode()
def record(model: PreTrainedModel, way: Way, ids: Sequence[int], steps: int = STEPS) -> Timeline:
    """The timeline of `steps` decode steps after a prefill of `ids`; measured. The ids' first are fed again."""
    before = enable(model)
    try:
        with make_cache(model, way.system, **way.options) as cache:
            model(torch.tensor([list(ids)]), past_key_values=cache, logits_to_keep=1)
            cache.timeline.clear()
            cache.counters.clear()
            for token in ids[: steps + 1]:
                model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)
            width = next(model.parameters()).element_size()
            cache.timeline.about = describe(cache.run, shape_of(model.config, width), way.name)
            return cache.timeline
    finally:
        disable(model, before)


def samples(timeline: Timeline) -> dict[str, tuple[float, float]]:
    """For each kind of work, size and seconds of one call: means over each step's calls, medians over the steps."""
    about, found = recorded(timeline), defaultdict(list)
    for step in decode_steps(timeline):
        if step.seconds is None:
            continue
        calls = defaultdict(list)
        for own in step.threads.values():
            beside = [(span, (span.end_ns - span.start_ns) / 1e9) for span in own if span.kind in BESIDE]
            for span, took in own_seconds(own) + beside:
                calls[span.kind].append((size_of(span.kind, span.bytes, about), took))
        calls["other"] = [(size_of("other", 0, about), max(0.0, step.other) / about.shape.layers)] * about.shape.layers
        for kind, own in calls.items():
            found[kind].append(np.mean(own, 0))
    return {kind: tuple(np.median(own, 0)) for kind, own in found.items() if kind != "wait"}


def costs(measured: Iterable[Timeline], source: str) -> dict[str, Cost]:
    """A cost for each `system.kind`, and for each kind over all systems: a point for each model and context, the median
    of its runs; made so that a larger one never takes less.
    """
    points = defaultdict(lambda: defaultdict(list))
    for timeline in measured:
        about = recorded(timeline)
        for kind, point in samples(timeline).items():
            for name in (f"{about.system}.{kind}", kind):
                points[name][about.shape, about.cached].append(point)
    out = {}
    for name, runs in sorted(points.items()):
        found = defaultdict(list)
        for own in runs.values():
            size, took = np.median(own, 0)
            found[float(f"{size:.4g}")].append(max(took, 1e-9))
        sizes = sorted(size for size in found if size > 0)
        if sizes:
            out[name] = Cost(tuple(sizes), rising([float(np.mean(found[size])) for size in sizes]), source)
    return out


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest values, in logarithms, that never fall: neighbours that do share their mean (isotonic regression)."""
    blocks: list[list[float]] = []
    for value in np.log(values):
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return tuple(float(np.exp(np.mean(block))) for block in blocks for _ in block)


def calibrate(
    folder: Path, each: Callable[[str], None] = lambda what: None, names: Iterable[str] | None = None, repeats: int = 1
) -> Profile:
    """Measure this machine; under two minutes when it is idle. `each` is told what is measured next."""
    each("parts")
    parts, source = measure_parts(folder), f"measured: {time.strftime('%Y-%m-%d')}, random models of two shapes"
    rng, timelines = np.random.default_rng(0), []
    for _ in range(repeats):
        for model in random_models():
            for way in ways(folder, names=names):
                for context in CONTEXTS:
                    each(f"{way.name}, {context} tokens")
                    timelines.append(record(model, way, rng.integers(3, 1000, context).tolist()))
    return Profile(THIS, machine(), parts, costs(timelines, source))


def measure_parts(folder: Path) -> dict[str, dict[str, Rate]]:
    """Memory, bandwidth and operations of host and GPU; the drive by size of a piece, with O_DIRECT."""
    source = f"measured: {time.strftime('%Y-%m-%d')}, by hillinfer profile"

    def rate(value: float) -> Rate:
        return Rate((value,), source)

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = {"cpu": {"memory": rate(memory), **{k: rate(v) for k, v in _compute("cpu").items()}}}
    parts["cpu"]["lanes"] = rate(len(os.sched_getaffinity(0)))
    if torch.cuda.is_available():
        parts["gpu"] = {"memory": rate(torch.cuda.mem_get_info()[1])}
        parts["gpu"] |= {k: rate(v) for k, v in _compute("cuda").items()}
        parts["link"] = {"to_gpu": _link("cpu", "cuda", source), "from_gpu": _link("cuda", "cpu", source)}
    parts["drive"] = _drive(folder, source)
    return parts


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median; the first touch is no part of it."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _compute(device: str) -> Mapping[str, float]:
    size, side, dtype = (64 << 20, 1024, torch.float32) if device == "cpu" else (1 << 30, 8192, torch.bfloat16)
    data, one = torch.ones(size // 4, device=device), torch.ones(side, side, device=device, dtype=dtype)
    return {"bandwidth": size / _seconds(data.sum), "flops": 2 * side**3 / _seconds(lambda: one @ one)}


def _link(source: str, to: str, how: str) -> Rate:
    rates = []
    for size in BLOCKS:
        data = torch.ones(size, dtype=torch.uint8, device=source)
        data = data.pin_memory() if source == "cpu" else data
        goal = torch.empty_like(data, device=to)
        rates.append(size / _seconds(lambda goal=goal, data=data: goal.copy_(data)))
    return Rate(tuple(rates), how, tuple(map(float, BLOCKS)))


def _drive(folder: Path, source: str) -> dict[str, Rate]:
    """Scattered pieces as this project moves them, with many under way and one at a time; none larger than MAX_READ."""
    whole, rates = aligned(BLOCKS[-1]), {}
    for name, engine, threads in (("read", "auto", 16), ("read_one", "threads", 1)):
        file = BlockFile(folder, threads, engine)
        try:
            base = file.allocate(len(whole))
            for block in reversed(BLOCKS):  # the largest first: what was never written is read for nothing
                step = min(block, MAX_READ)
                places = range(0, len(whole), max(block, len(whole) // 256))
                jobs = [(base + at, whole[at : at + step]) for p in places for at in range(p, p + block, step)]
                for verb, own in (("write", "write"), ("read", name)):
                    took = _seconds(partial(file.transfer, verb, jobs, 0, 0), 3)
                    rates.setdefault(own, {}).setdefault(block, len(jobs) * step / took)
        finally:
            file.close()
    return {
        name: Rate(tuple(own[block] for block in BLOCKS), source, tuple(map(float, BLOCKS)))
        for name, own in rates.items()
    }
