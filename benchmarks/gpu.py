"""Everything that only a GPU can show, in one visit: python -m benchmarks.gpu [--out FOLDER] [--seconds 470]

In this order, so that what is cut off at the end matters least: facts and rates of the machine; equality of the
systems' tokens with the CPU's, under CUDA_LAUNCH_BLOCKING; compute-sanitizer over some of them; decode steps of an
8B-shaped model with random weights and KV, beside transformers' own caches, by worth. Random keys have neither locality
nor hot tokens, the worst case for pool and prefetch. Each row is written to FOLDER/gpu.jsonl as soon as it is known; a
case that would not end in time is left out with the reason. The exit code is the sum of FAILED over what failed.

`--shape tiny --device cpu` runs the same code without a GPU; `--here` keeps equality in this process.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # else a Hopper builds a cuDNN plan for each new length
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # layers that grow in turn leave holes

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_rates
from benchmarks.stack import SHAPES, Shape
from hillinfer import attention, native
from hillinfer.assets import machine
from hillinfer.native import ring
from hillinfer.systems.registry import make_cache

ALPHA, STEPS = 0.1, 10
PARTS = ("facts", "rates", "equality", "sanitizer", "speed")
FAILED = {"facts": 1, "rates": 1, "equality": 2, "attention": 2, "sanitizer": 4, "speed": 8}
SYSTEMS = ("full", "topk", "hillinfer", "leoam", "flexgen", "dualblade", "quest", "infinigen", "h2o", "snapkv")
ON_DRIVE = ("hillinfer", "leoam", "lru", "flexgen", "dualblade")
FEW = ("topk", "hillinfer", "flexgen")  # one of each kind: in GPU memory, on the host, streamed
OWN = ("hf", "offloaded")  # transformers' caches
HELD = "hillinfer, all KV in host memory"
BARS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of attention against fp64, relative
SECONDS = {"topk": 14, "offloaded": 15, "hillinfer": 25, "flexgen": 25, "dualblade": 25, "leoam": 50}  # of 32K, batch 1


@dataclass
class Sheet:
    """Rows of JSON, each on the disk before the next is measured, within a time limit."""

    path: Path
    until: float
    failed: set[str] = field(default_factory=set)

    def left(self) -> float:
        return self.until - time.monotonic()

    def add(self, part: str, **row) -> None:
        if row.get("failed") or row.get("same") is False:
            self.failed.add(part)
        text = json.dumps({"part": part, "left": round(self.left(), 1)} | row)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def trying(self, part: str, **about):
        """Whatever fails is a row, and the rest goes on."""
        try:
            yield
        except Exception as error:
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            self.add(part, **about, failed=text, where=where)


def facts(sheet: Sheet, device: str) -> None:
    row = {
        "machine": machine(),
        "torch": torch.__version__,
        "native": native.isa(),
        "io_uring": ring.why_not() or "yes",
    }
    if device == "cuda":
        row |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        asked = "pcie.link.gen.current,pcie.link.width.current,driver_version,clocks.mem"
        words = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            row["smi"] = subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    sheet.add("facts", **row)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(7)
    shape = dict(vocab_size=97, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    ends = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM(LlamaConfig(**shape, **ends, num_key_value_heads=2, max_position_embeddings=4096)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def said(model, system: str, n: int, batch: int, pad: int, inference: bool) -> torch.Tensor:
    """Tokens of a generation, and of another turn after a crop."""
    ids = torch.randint(2, 97, (batch, n), generator=torch.Generator().manual_seed(11))
    ids[-1, :pad] = 0
    ids, mask, new = ids.to(model.device), (ids != 0).long().to(model.device), dict(max_new_tokens=6, do_sample=False)
    options = {"compress": 0.0} if system == "leoam" else {}  # "auto" depends on time
    with contextlib.ExitStack() as stack:
        for context in (torch.inference_mode(inference), torch.no_grad()):
            stack.enter_context(context)
        if system in ON_DRIVE:
            options["drive"] = stack.enter_context(tempfile.TemporaryDirectory())
        cache = stack.enter_context(make_cache(model, system, **options))
        first = model.generate(ids, attention_mask=mask, past_key_values=cache, **new)
        cache.crop(-3)
        again = torch.cat((first[:, : cache.get_seq_length()], ids[:, -7:]), 1)
        shown = torch.cat((mask, mask.new_ones(batch, again.shape[1] - n)), 1)
        return model.generate(again, attention_mask=shown, past_key_values=cache, **new).cpu()


def equality(sheet: Sheet, device: str, place, systems: tuple = SYSTEMS) -> None:
    """Tokens as on the CPU; attention over tensors on the device against fp64."""
    for system in systems:
        for way in (dict(n=200, batch=1, pad=0, inference=False), dict(n=500, batch=2, pad=30, inference=True)):
            with sheet.trying("equality", system=system, **way):
                same = torch.equal(said(tiny(), system, **way), said(place(tiny()), system, **way))
                sheet.add("equality", system=system, **way, same=same)
    random = torch.Generator().manual_seed(3)
    query, kv = torch.randn(2, 8, 1, 128, generator=random), torch.randn(2, 900, 2, 2, 128, generator=random)
    valid = torch.rand(2, 900, generator=random) > 0.3
    for dtype, bar in BARS.items():
        for mask in (None, valid):
            about = dict(dtype=str(dtype), masked=mask is not None)
            with sheet.trying("attention", **about):
                low = query.to(dtype), kv.to(dtype)
                exact = attention.over_tensors(*(part.double() for part in low), mask, 0.1)[0]
                there = mask if mask is None else mask.to(device)
                got = attention.over_tensors(*(part.to(device) for part in low), there, 0.1)[0].cpu().double()
                error = float((got - exact).norm() / exact.norm())
                sheet.add("attention", **about, error=error, bar=bar, same=error <= bar)


def again(sheet: Sheet, part: str, seconds: float, before: tuple = (), few: bool = False, **env: str) -> None:
    """Equality in a process of its own: what kills that does not kill this."""
    words = [*before, sys.executable, "-m", "benchmarks.gpu", "--here", "--parts", "equality"]
    words += ["--out", str(sheet.path.parent / part), *(["--few"] if few else [])]
    with sheet.trying(part):
        limit = max(1, min(seconds, sheet.left()))
        done = subprocess.run(words, env=os.environ | env, timeout=limit, capture_output=True, text=True)
        sheet.add(part, same=done.returncode == 0, code=done.returncode, tail=(done.stdout + done.stderr)[-400:])


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


def main(arguments: list[str] | None = None, place=None) -> int:
    """place(model) puts a model from the CPU onto the device; given where the device is a stand-in."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--drive", type=Path, default=Path("out"), help="folder on the drive to benchmark")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for gpu.jsonl")
    parser.add_argument("--seconds", type=float, default=470)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--few", action="store_true", help="equality of three systems only")
    parser.add_argument("--here", action="store_true", help="equality in this process")
    words = parser.parse_args(arguments)
    if words.device == "cuda" and place is None and not torch.cuda.is_available():
        parser.error("no GPU here; try the same code with --shape tiny --device cpu")
    for folder in (words.drive, words.out):
        folder.mkdir(parents=True, exist_ok=True)
    sheet, real = Sheet(words.out / "gpu.jsonl", time.monotonic() + words.seconds), words.device == "cuda" and not place
    sheet.path.unlink(missing_ok=True)
    place, parts = place or (lambda model: model.to(words.device)), words.parts.split(",")
    shared = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=words.drive) as disk,
        tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as memory,
    ):
        if "facts" in parts:
            with sheet.trying("facts"):
                facts(sheet, words.device)
        if "rates" in parts:
            for what, rate in gpu_rates.rates(words.device, real, {"disk": Path(disk), "memory": Path(memory)}):
                with sheet.trying("rates", what=what):
                    sheet.add("rates", what=what, **rate())
        if "equality" in parts and (words.here or not real):
            equality(sheet, words.device, place, FEW if words.few else SYSTEMS)
        elif "equality" in parts:
            again(sheet, "equality", 100, CUDA_LAUNCH_BLOCKING="1")
        if "sanitizer" in parts and real:
            tool = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
            again(sheet, "sanitizer", 75, tool, True, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "speed" in parts:
            with sheet.trying("speed"):
                all_speeds(sheet, words.shape, words.device, place, Path(disk), Path(memory), real)
    sheet.add("end", parts_that_failed=sorted(sheet.failed))
    return sum({FAILED[part] for part in sheet.failed})


if __name__ == "__main__":
    raise SystemExit(main())
