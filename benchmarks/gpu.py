"""Everything that only a GPU can show, in one visit: python -m benchmarks.gpu [--out FOLDER] [--seconds 470]

In this order, so that what is cut off at the end matters least: facts and rates of the machine; equality of the
systems' tokens with the CPU's, under CUDA_LAUNCH_BLOCKING; compute-sanitizer over some of them; decode steps
(`gpu_speed`), by worth. Each row is written to FOLDER/gpu.jsonl as soon as it is known; a case that would not end in
time is left out with the reason. The exit code is the sum of FAILED over what failed.

`--shape tiny --device cpu` runs the same code without a GPU; `--here` keeps equality in this process.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # else a Hopper builds a cuDNN plan for each new length
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # layers that grow in turn leave holes

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_rates
from benchmarks.gpu_sheet import Sheet
from benchmarks.gpu_speed import FEW, ON_DRIVE, all_speeds
from benchmarks.stack import SHAPES
from hillinfer import attention, native
from hillinfer.assets import machine
from hillinfer.native import ring
from hillinfer.systems.registry import make_cache

PARTS = ("facts", "rates", "equality", "sanitizer", "speed")
FAILED = {"facts": 1, "rates": 1, "equality": 2, "attention": 2, "sanitizer": 4, "speed": 8}
SYSTEMS = ("full", "topk", "hillinfer", "leoam", "flexgen", "dualblade", "quest", "infinigen", "h2o", "snapkv")
BARS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of attention against fp64, relative


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
