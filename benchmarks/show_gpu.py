"""`make show-gpu`: every claim about the GPU's path, measured on whatever is here.

Without a GPU: on the stand-in (tests/fake_gpu), which tells what is equal, ordered and waited for, but no times. With
one also benchmarks.gpu, at most eight minutes; DRIVE=FOLDER sets the drive, OUT=FOLDER has an earlier run's gpu.jsonl.
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.claims import Claim, tests, verdict
from benchmarks.gpu_speed import HELD
from hillinfer.systems.shapes import SHAPES
from hillinfer.whatif import modelled
from hillinfer.whatif.devices import find_profile
from hillinfer.whatif.scenario import Scenario

STAND_IN = (  # claim, tests
    ("every system says on the stand-in what it says on the CPU, bf16 too", "every_system or bf16 or scores or ways"),
    ("chunks, turns, crops, sessions, a user's stream and default device", "turns or sessions or stream or default"),
    ("host waits a layer and step: in GPU memory 0, hillinfer, leoam, lru and lossless 1, at any batch", "hardly"),
    ("hits and times of a GPU's work a step later, without a wait; an observer", "later or observer"),
    ("planted faults are found", "planted or itself"),
    ("selection on the device, to the bit that of the host over 200 cases, without a wait", "bit"),
    ("one script, rows as they come, exit code", "script or exit_code"),
)


BARS = {1 << 15: 60, 1 << 17: 110}  # ms a token of an 8B model at alpha 0.1, all KV in host memory


def modelled_lanes() -> list[Claim]:
    """A token on a PC by the model, each lane named; as it is, and with codes in host memory."""
    profile, made = find_profile("rtx4090-gen4-nvme"), []
    for tokens, bar in BARS.items():
        case = Scenario(profile, SHAPES["llama-3.1-8b"], tokens, 1, 0.1)
        for name in ("hillinfer-near", "hillinfer-near-host"):
            line, busy = modelled.timeline(case, name), Counter()
            for span in line.spans:
                busy[f"{span.lane} {span.kind}"] += 1e-6 * (span.end_ns - span.start_ns) / 3  # of 3 steps
            took = 1e3 * modelled.seconds(case, name)
            lanes = ", ".join(f"{lane} {ms:.1f}" for lane, ms in busy.items())
            text = f"{line.source}, llama-3.1-8b, {tokens} tokens, {name}, ms a token"
            if name == "hillinfer-near":
                made.append(Claim(text, f"{took:.0f} ({lanes})", f"{bar} or less", took <= bar).show())
            else:
                print(f"       | {text} | {took:.0f} ({lanes})")
    return made


def claims_of(rows: list[dict]) -> list[Claim]:
    """What the rows of a run on a GPU say."""
    made = []
    for part, text in (
        ("equality", "tokens are the CPU's"),
        ("attention", "attention against fp64"),
        ("sanitizer", "compute-sanitizer"),
    ):
        own = [row for row in rows if row["part"] == part]
        good = sum(row.get("same", False) for row in own)
        made.append(Claim(text, f"{good} of {len(own)}", "all", bool(own) and good == len(own)).show())
    found = {
        (row["case"], row["tokens"], row["batch"]): row["ms"] for row in rows if row["part"] == "speed" and "ms" in row
    }
    for tokens in (1 << 15, 1 << 17):
        own, slow, all_there = (found.get((name, tokens, 1)) for name in (HELD, "offloaded", "full"))
        if own and slow:
            text = f"{HELD}, {tokens} tokens, over transformers' offloaded cache"
            made.append(Claim(text, f"{slow / own:.2f}x", "4x or more", slow / own >= 4).show())
        if own and all_there:
            print(f"       | the same, ms a step beside all KV in GPU memory | {own:.1f} and {all_there:.1f}")
    return made


def main() -> int:
    made = [tests(text, "tests/test_gpu.py", "-k", which).show() for text, which in STAND_IN]
    made += modelled_lanes()
    out = Path(os.environ.get("OUT", "out/gpu"))
    if torch.cuda.is_available() and not (out / "gpu.jsonl").exists():
        gpu.main(["--drive", os.environ.get("DRIVE", "out"), "--out", str(out)])
    if (out / "gpu.jsonl").exists():
        rows = [json.loads(line) for line in (out / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
        made += claims_of(rows)
    else:
        print("not measured here: equality, compute-sanitizer and speed on a GPU (python -m benchmarks.gpu): no GPU")
    return verdict(made)


if __name__ == "__main__":
    raise SystemExit(main())
