"""Decode steps of an 8B-shaped model with random weights and KV, of the systems and of transformers' own caches.

Random keys have neither locality nor hot tokens, the worst case for pool and prefetch.
"""

import contextlib
import gc
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.gpu_sheet import Sheet
from benchmarks.stack import SHAPES, Shape
from hillinfer.systems.registry import make_cache

ALPHA, STEPS = 0.1, 10
ON_DRIVE = ("hillinfer", "leoam", "lru", "flexgen", "dualblade")
FEW = ("topk", "hillinfer", "flexgen")  # one of each kind: in GPU memory, on the host, streamed
OWN = ("hf", "offloaded")  # transformers' caches
HELD = "hillinfer, all KV in host memory"
SECONDS = {"topk": 14, "offloaded": 15, "hillinfer": 25, "flexgen": 25, "dualblade": 25, "leoam": 50}  # of 32K, batch 1


def make_model(shape: Shape, device: str) -> LlamaForCausalLM:
    """A model with random bf16 weights, created on the device."""
    config, large = shape.config(), shape.name != "tiny"
    config.intermediate_size, config.vocab_size = 7 * config.hidden_size // 2, 128_256 if large else 512
    config.max_position_embeddings = 1 << 18
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def filled(model, system: str, n: int, batch: int, options: dict):
    """A cache with n tokens of random KV, a layer at a time."""
    config = model.config
    shape = 2, batch, config.num_key_value_heads, n, config.head_dim
    if system in OWN:
        cache = DynamicCache(config=config, offloading=system == "offloaded")
    else:
        cache = make_cache(model, system, alpha=ALPHA, max_tokens=n + 64, **options)
    with contextlib.ExitStack() as failed:
        failed.callback(getattr(cache, "close", lambda: None))
        for index, layer in enumerate(cache.layers):
            kv = torch.randn(shape, dtype=torch.bfloat16, device=model.device)
            cache.update(*kv, index) if system in OWN else layer.fill(*kv)
        failed.pop_all()
    return cache


def speed(sheet: Sheet, model, name: str, system: str, n: int, batch: int, warm: int, **options) -> None:
    """One case's row: quartiles of ms per step, CPU time, peak GPU memory, MB and ms by lane."""
    gpu, began, seconds, cpu = model.device.type == "cuda", time.monotonic(), [], []
    wait = torch.cuda.synchronize if gpu else lambda: None
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    cache = filled(model, system, n, batch, options)
    with contextlib.closing(cache) if system not in OWN else contextlib.nullcontext():
        fill_s, token = time.monotonic() - began, torch.full((batch, 1), 5).to(model.device)
        for _ in range(warm + STEPS):
            start, used = time.perf_counter(), time.process_time()
            model(token, past_key_values=cache, use_cache=True)
            wait()
            seconds.append(1e3 * (time.perf_counter() - start))
            cpu.append(1e3 * (time.process_time() - used))
            if sheet.left() < 15 and len(seconds) > warm + 2:
                break
        low, middle, high = statistics.quantiles(seconds[warm:], n=4)
        row = dict(case=name, system=system, tokens=n, batch=batch, ms=middle, ms_low=low, ms_high=high)
        row |= dict(cpu_ms=statistics.median(cpu[warm:]), fill_s=fill_s, steps=len(seconds) - warm)
        if gpu:
            row["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        if system not in OWN:
            steps = len(seconds) - warm
            last = [span for span in cache.timeline.spans if span.step > cache.timeline.step - steps]
            for key in {(span.lane, span.kind) for span in last}:
                own = [span for span in last if (span.lane, span.kind) == key]
                took = sum(span.end_ns - span.start_ns for span in own)
                row[" ".join(key)] = [took / steps / 1e6, sum(span.bytes for span in own) / steps / 1e6]  # ms, MB
            row["why"] = cache.why_split()
        sheet.add("speed", **row)


def case(system: str, n: int, batch: int, drive: Path, name: str | None = None, **options) -> dict:
    options |= {"drive": drive} if system in ON_DRIVE else {}
    return dict(name=name or system, system=system, n=n, batch=batch, **options)


def cases(shape: str, disk: Path, memory: Path) -> list[dict]:
    """What to measure, in order of worth. A drive in memory tells the GPU's path from an unknown disk."""
    if shape == "tiny":
        return [case(s, 300, batch, disk) for batch in (1, 2) for s in (*OWN, *FEW)]
    short, long, found = 1 << 15, 1 << 17, []
    for n, batch, names in (
        (short, 1, "full hf offloaded topk hillinfer held flexgen"),
        (long, 1, "full offloaded held topk hillinfer"),
        (short, 8, "full held"),
        (short, 1, "dualblade leoam"),
        (short, 8, "offloaded"),
    ):
        for name in names.split():
            if name == "held":
                found.append(case("hillinfer", n, batch, memory, HELD, host_budget="64GiB", lookahead=False))
            else:
                found.append(case(name, n, batch, memory))
    return [*found, case("hillinfer", short, 1, disk, "hillinfer, disk")]


def all_speeds(sheet: Sheet, shape: str, device: str, place, disk: Path, memory: Path, real: bool) -> None:
    small = shape == "tiny"
    with torch.inference_mode():
        model = place(make_model(SHAPES[shape], "cpu" if small else device))
        for one in cases(shape, disk, memory):
            about, system = dict(case=one["name"], tokens=one["n"], batch=one["batch"]), one["system"]
            need = 0 if small else SECONDS.get(system, 8) * one["n"] * one["batch"] / 32_768 + 8
            if system == "offloaded" and not real:
                sheet.add("speed", **about, left_out="transformers' offloaded cache needs a GPU")
            elif sheet.left() < need:
                sheet.add("speed", **about, left_out=f"{sheet.left():.0f} s are left, it takes about {need:.0f}")
            else:
                ahead = system in ("hillinfer", "leoam") and one.get("lookahead") is not False
                warm = 2 if small else 16 if ahead else 11 if system in ON_DRIVE else 4  # with the trials of each way
                with sheet.trying("speed", **about):
                    speed(sheet, model, warm=warm, **one)
            gc.collect()
            if real:
                torch.cuda.empty_cache()
