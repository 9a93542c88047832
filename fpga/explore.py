"""Measure configurations of the kernel: `python -m fpga.explore [--again] [NAME ...]`, or all by `make -C fpga table`.

Cycles come from simulation, area from yosys, recall from the embedded model's keys. Writes the rows to
hillinfer/systems/hillinfer/cec.json, and the table with its Pareto plot to out/fpga/cec.html. Existing rows are
measured again if the kernel's source or a tool has changed, or with --again.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from fpga.sim import kernel as sim
from fpga.sim.check import codes_of, differences
from fpga.sim.kernel import FPGA, Config, Image, Kernel
from fpga.sim.real import recall
from fpga.synth import area
from hillinfer.systems.hillinfer import cec

TOKENS, K, HEADS = 131_072, 4_096, 8
EXPLORED = [Config(8, 128), Config(4, 128), Config(8, 64), Config(4, 64)]
EXPLORED += [Config(8, 128, lanes=32), Config(8, 128, lanes=16), Config(4, 128, lanes=32), Config(8, 128, group=8)]


def cycles(kernel: Kernel, n: int, k: int, mode: int, rate: float = 1.0, heads: int = HEADS) -> int:
    """Cycles of one call on normally distributed codes, with a checked answer. rate: memory rate over port rate."""
    config, rng = kernel.config, np.random.default_rng(n)
    codes = codes_of("bell", rng, (heads, n, config.head_dim), config.bits)
    query = codes_of("bell", rng, (heads, config.group, config.head_dim), 8, query=True)
    image = Image(config, codes, query, k, mode)
    kernel.memory(rate=rate * config.lanes)
    result, answers = sim.call(kernel, image)
    wrong = differences(image, answers)
    if result.status or wrong:
        raise RuntimeError(f"{config.name}: status {result.status}, {wrong[:1]}")
    return result.cycles


def measure(config: Config, recalls: dict) -> dict:
    """One row of the table."""
    kernel = Kernel(config)
    few, many = (cycles(kernel, n, 0, sim.ALL) for n in (1024, 16384))
    every = (many - few) / (HEADS * (16384 - 1024))
    row = dict(bits=config.bits, head_dim=config.head_dim, group=config.group, lanes=config.lanes)
    row |= dict(cycles=cycles(kernel, TOKENS, K, sim.INDICES) / (HEADS * TOKENS))
    row |= dict(cycles_75=cycles(kernel, TOKENS, K, sim.INDICES, 0.75) / (HEADS * TOKENS))
    row |= dict(cycles_all=every, call_cycles=few - HEADS * 1024 * every)
    kernel.close()
    return row | dict(area=area.area(config), recall=recalls)


def source() -> str:
    """Digest of the kernel's source."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted((FPGA / "rtl").glob("*.v")))).hexdigest()[:16]


def main() -> None:
    names = set(sys.argv[1:]) - {"--again"}
    again = "--again" in sys.argv
    if unknown := names - {c.name for c in EXPLORED}:
        sys.exit(f"no configuration {', '.join(unknown)}; there are {', '.join(c.name for c in EXPLORED)}")
    wanted = [c for c in EXPLORED if not names or c.name in names]
    verilator = subprocess.run(["verilator", "--version"], capture_output=True, text=True).stdout.strip()
    now = {"kernel source": source(), "simulation": verilator, "synthesis": area.version()}
    recalls = {bits: {str(share): recall(bits, share) for share in (0.1, 0.2)} for bits in (8, 4)}
    for config in wanted:
        if again or config.name not in measured(now):
            row = measure(config, recalls[config.bits])
            print(config.name, row, flush=True)
            rows = measured(now) | {config.name: row}  # read again: another process may have added rows
            ordered = [rows[c.name] for c in EXPLORED if c.name in rows]
            cec.TABLE.write_text(json.dumps({"tools": now, "rows": ordered}, indent=1) + "\n")
    print(show())


def measured(now: dict) -> dict[str, dict]:
    """Rows of the table by name, if measured with the current source and tools."""
    kept = json.loads(cec.TABLE.read_text()) if cec.TABLE.exists() else {}
    return {cec.Configuration(**row).name: row for row in kept["rows"]} if kept.get("tools") == now else {}


def show(folder: Path = sim.CACHE) -> Path:
    """Print the table, and write table and Pareto plot as an HTML page."""
    from hillinfer.workbench.cec import cec_frame, pareto_figure, tools
    from hillinfer.workbench.report import write_report

    frame = cec_frame()
    print(frame.to_string(index=False))
    facts = [f"{name}: {value}" for name, value in tools().items()]
    facts += [
        f"Clock {cec.CLOCK / 1e6:.0f} MHz assumed. Cycles simulated, area by yosys; shares are of the whole xcku15p."
    ]
    page = write_report(
        folder / "cec.html",
        "The evaluation kernel's configurations",
        facts,
        list(frame),
        frame.astype(str).values.tolist(),
        [pareto_figure()],
    )
    return page


if __name__ == "__main__":
    main()
