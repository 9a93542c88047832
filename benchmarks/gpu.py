"""GPU decode with offloaded KV: python -m benchmarks.gpu [--tokens 32768 131072] [--batch 1 8] [--out FILE]

A Llama-3-8B-shaped Hugging Face model with random bf16 weights and random KV: `full` on the GPU, transformers'
offloaded cache, and flexgen, hillinfer, leoam and dualblade with a drive. Random keys have neither locality nor hot
tokens, which is the worst case for the pool and prefetch of selective systems.

Cases that do not fit are skipped with the reason. `--shape tiny --device cpu` runs the same code without a GPU.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.micro import facts, keep
from benchmarks.shape import ALPHA
from benchmarks.stack import SHAPES, Shape
from hillinfer.systems.registry import make_cache

SYSTEMS = ("full", "offloaded", "flexgen", "hillinfer", "leoam", "dualblade")
WARM, STEPS, CHUNK = 11, 10, 4096  # the warm-up includes five trial steps of each lookahead mode


def make_model(shape: Shape, device: str) -> LlamaForCausalLM:
    """A model with random bf16 weights, created on the device."""
    config, large = shape.config(), shape.name != "tiny"
    config.intermediate_size, config.vocab_size = 7 * config.hidden_size // 2, 128_256 if large else 512
    config.max_position_embeddings = 1 << 18
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def make_filled(model: LlamaForCausalLM, system: str, n: int, batch: int, folder: Path):
    """A system's cache with n tokens of random KV per layer."""
    config, device = model.config, model.device
    if system == "offloaded":
        cache = DynamicCache(config=config, offloading=True)
        model.set_attn_implementation("sdpa")
    elif system == "full":
        cache = make_cache(model, system)
    else:
        cache = make_cache(model, system, alpha=ALPHA, drive=folder, max_tokens=n + WARM + STEPS + 1)
    shape = (2, batch, config.num_key_value_heads, CHUNK, config.head_dim)
    for start in range(0, n, CHUNK):  # in chunks, like a long prefill
        kv = torch.randn(shape, dtype=torch.bfloat16, device=device)[:, :, :, : n - start]
        for index, layer in enumerate(cache.layers):
            if system == "offloaded":
                cache.update(kv[0], kv[1], index)
            else:
                layer.lazy_initialization(kv[0], kv[1])
                layer.layer.append(kv[0], kv[1])
    return cache


def decode(model: LlamaForCausalLM, system: str, n: int, batch: int, folder: Path) -> dict:
    """One system's row: quartiles of ms per step, peak GPU memory, and drive bytes per step."""
    gpu, seconds = model.device.type == "cuda", []
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    cache = make_filled(model, system, n, batch, folder)
    token = torch.full((batch, 1), 5, device=model.device)
    try:
        for _ in range(WARM + STEPS):
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(1e3 * (time.perf_counter() - start))
        low, middle, high = statistics.quantiles(seconds[WARM:], n=4)
        row = {"system": system, "tokens": n, "batch": batch, "ms": middle, "ms_low": low, "ms_high": high}
        row["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6 if gpu else 0.0
        if system != "offloaded":
            last = [span for span in cache.timeline.spans if span.step > cache.timeline.step - STEPS]
            moved = sum(span.bytes for span in last if span.lane == "drive" and span.kind != "write")
            row["drive_mb"] = moved / STEPS / 1e6
        return row
    finally:
        if system != "offloaded":
            cache.close()


def measure(shape: Shape, device: str, tokens: list[int], batches: list[int], systems: list[str], folder: Path) -> dict:
    """One row per case, and the reasons of skipped cases."""
    model, rows, left_out = make_model(shape, device), [], []
    for n in tokens:
        for batch in batches:
            for system in systems:
                try:
                    if system == "offloaded" and device == "cpu":
                        raise ValueError("transformers' offloaded cache needs a GPU")
                    rows.append(decode(model, system, n, batch, folder))
                    print(" ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
                except (torch.OutOfMemoryError, OSError, ValueError) as error:
                    left_out.append({"case": f"{system}, {n} tokens, batch {batch}: {str(error).splitlines()[0]}"})
                    print(f"left out: {left_out[-1]['case']}")
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
    return {"rows": rows, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="*", default=[32_768, 131_072])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to benchmark")
    parser.add_argument("--out", type=Path, help="write the result here as JSON, for benchmarks.compare")
    words = parser.parse_args()
    if words.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: no GPU here; try the same code with --shape tiny --device cpu --tokens 512 --batch 1 2"
        )
    words.drive.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if words.device == "cuda" else "no GPU"
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=words.drive) as folder:
        case = SHAPES[words.shape], words.device, words.tokens, words.batch, words.systems.split(","), Path(folder)
        result = {"facts": facts(STEPS) | {"gpu": name, "shape": words.shape}} | measure(*case)
    keep(words.out, result)


if __name__ == "__main__":
    main()
