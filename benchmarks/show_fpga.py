"""`make show-fpga`: measure all machine-checkable claims about the SmartSSD's kernel and its host path.

Cycles are simulated and areas synthesised anew; the committed table is not used. No card is involved.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.claims import ROOT, Claim, tests, verdict
from fpga.explore import HEADS, TOKENS, K, cycles
from fpga.formal.prove import DEPTH, PROOFS, prove
from fpga.sim import kernel as sim
from fpga.sim.check import LEGAL, coverage
from fpga.sim.kernel import Config, Kernel
from fpga.synth.area import area
from tests.test_fpga import CONFIGS, opened, refused, run_cases

BARS = {  # of the kernels with double-buffered scores, which may cost twice the UltraRAM of one buffer (12 and 8)
    Config(8, 128): {"LUT": 6000, "FF": 9000, "DSP": 128, "URAM": 24, "BRAM36": 4},
    Config(4, 128): {"LUT": 4000, "DSP": 256, "URAM": 16},
}


def states() -> Claim:
    """State-machine coverage in random runs with stalls, and in runs that must be rejected."""
    seen, missed = [], set()
    for config in CONFIGS[:2]:
        run_cases(config, 40, 1)
        refused(config)
        for machine, (unseen, illegal) in coverage(opened(config).transitions()).items():
            legal = len(LEGAL[machine].split())
            seen.append(f"{machine} {legal - len(unseen)}/{legal}")
            missed |= unseen | illegal
    names = " and ".join(config.name for config in CONFIGS[:2])
    return Claim(f"transitions seen of the state machines, {names}", ", ".join(seen), "all, and no other", not missed)


def speed() -> list[Claim]:
    """Cycles per token over the memory bound; every answer is checked against the evaluator."""
    claims = []
    for config in BARS:
        kernel = Kernel(config)
        for rate in (1.0, 0.75):
            taken = cycles(kernel, TOKENS, K, sim.INDICES, rate) / (HEADS * TOKENS)
            over = taken * rate / config.ideal - 1
            text = f"{config.name}: cycles/token at {TOKENS:,} tokens, k={K:,}, {HEADS} heads, "
            text += f"memory {64 * rate:.0f} B/cycle"
            claims.append(Claim(text, f"{taken:.3f}, {over:.1%} over ideal", "within 10 %", over <= 0.1).show())
        kernel.close()
    return claims


def areas() -> list[Claim]:
    claims = []
    for config, bars in BARS.items():
        found = area(config)
        figure = ", ".join(f"{found[kind]:g} {kind}" for kind in found)
        bar = ", ".join(f"{value} {kind}" for kind, value in bars.items())
        met = all(found[kind] <= value for kind, value in bars.items())
        claims.append(Claim(f"{config.name}: area by yosys", figure, f"at most {bar}", met).show())
    return claims


def fresh() -> list[Claim]:
    """`make -C fpga sim synth` on a fresh clone, with the tools installed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        start = time.perf_counter()
        command = ["make", "-C", f"{folder}/fpga", "sim", "synth", f"PYTHON={sys.executable}"]
        code = subprocess.run(command, capture_output=True).returncode
        minutes = (time.perf_counter() - start) / 60
    text = "make -C fpga sim synth on a fresh clone, tools and Python environment installed"
    return [Claim(text, f"{minutes:.1f} min, exit {code}", "10 min", code == 0 and minutes < 10).show()]


def refusal() -> Claim:
    """The command on this machine, without a card."""
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text("Once upon a time", encoding="utf-8")
        command = [sys.executable, "-m", "hillinfer", "run", "--model", "embedded", "--prompt-file", prompt]
        command += ["--system", "hillinfer", "--drive", folder, "--drive-kind", "xrt"]
        done = subprocess.run(command, capture_output=True, text=True)
    text = done.stderr.strip()
    met = done.returncode == 1 and "\n" not in text and "needs" in text
    return Claim(
        "hillinfer run --drive-kind xrt without a card", f"exit {done.returncode}: {text}", "says what is missing", met
    )


def host() -> list[Claim]:
    text = "XrtDrive on a strict stand-in for pyxrt: the contract, and the emulated drive's tokens"
    return [refusal().show(), tests(text, "tests/test_xrt.py").show()]


def exact() -> list[Claim]:
    file = "tests/test_fpga.py"
    many = "200 random cases exact in each of four configurations, stalls and all modes; 60 in three more"
    full = "131,072 tokens at the hardest data: all equal, few different"
    return [
        tests("stalls, errors, guards, real keys, HLS twin, the committed table", file).show(),
        states().show(),
        tests(many, "-m", "slow", file, "-k", "many").show(),
        tests(full, "-m", "slow", file, "-k", "capacity").show(),
    ]


def proofs() -> list[Claim]:
    held = {top: prove(top) for top in PROOFS}
    figures = {top: f"{'hold' if good else 'fail'} for {DEPTH} cycles" for top, good in held.items()}
    return [Claim(f"{top}: assertions, bounded", figures[top], "hold", held[top]).show() for top in held]


PARTS = {"host": host, "exact": exact, "proofs": proofs, "speed": speed, "area": areas, "fresh": fresh}


def main() -> int:
    """Run all parts, or the named ones."""
    return verdict([claim for part in sys.argv[1:] or PARTS for claim in PARTS[part]()])


if __name__ == "__main__":
    sys.exit(main())
