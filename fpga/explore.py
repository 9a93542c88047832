"""Measure configurations of the kernel: `python -m fpga.explore [NAME ...]` or `make -C fpga table`.

Cycles by simulation, area by yosys, recall on the embedded model's keys. Rows go to hillinfer/evaluator/cec.json,
the table and its Pareto plot to out/fpga/cec.html. A row is measured again when the kernel's source has changed.
"""

import hashlib
import json
import subprocess
import sys

import numpy as np

from fpga.sim import kernel as sim
from fpga.sim.check import codes_of, differences
from fpga.sim.kernel import FPGA, Config, Image, Kernel
from fpga.sim.real import recall
from fpga.synth import area
from hillinfer.evaluator import cec

TOKENS, K, HEADS = 131_072, 4_096, 8
EXPLORED = [Config(8, 128), Config(4, 128), Config(8, 64), Config(4, 64)]
EXPLORED += [Config(8, 128, lanes=32), Config(8, 128, lanes=16), Config(4, 128, lanes=32), Config(8, 128, group=8)]


def cycles(kernel: Kernel, n: int, k: int, mode: int, rate: float = 1.0, heads: int = HEADS) -> int:
    """Cycles of one call on bell-shaped codes, whose answer is checked; rate: the memory's, of the port's."""
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
    wanted = [c for c in EXPLORED if not sys.argv[1:] or c.name in sys.argv[1:]]
    verilator = subprocess.run(["verilator", "--version"], capture_output=True, text=True).stdout.strip()
    now = {"kernel source": source(), "simulation": verilator, "synthesis": area.version()}
    kept = json.loads(cec.TABLE.read_text()) if cec.TABLE.exists() else {"tools": {}, "rows": []}
    rows = {} if kept["tools"] != now else {cec.Configuration(**row).name: row for row in kept["rows"]}
    recalls = {bits: {str(share): recall(bits, share) for share in (0.1, 0.2)} for bits in (8, 4)}
    for config in wanted:
        if config.name not in rows:
            rows[config.name] = measure(config, recalls[config.bits])
            print(config.name, rows[config.name], flush=True)
            order = [c.name for c in EXPLORED]
            text = json.dumps(
                {"tools": now, "rows": sorted(rows.values(), key=lambda row: order.index(key(row)))}, indent=1
            )
            cec.TABLE.write_text(text + "\n")
    show()


def key(row: dict) -> str:
    return cec.Configuration(**row).name


def show() -> None:
    """The table on the terminal; table and Pareto plot as a page."""
    from hillinfer.workbench.cec import cec_frame, pareto_figure
    from hillinfer.workbench.report import write_report

    frame = cec_frame()
    print(frame.to_string(index=False))
    facts = [f"{name}: {value}" for name, value in cec.tools().items()]
    facts += [
        f"Clock {cec.CLOCK / 1e6:.0f} MHz assumed. Cycles simulated, area by yosys; shares are of the whole xcku15p."
    ]
    page = write_report(
        sim.CACHE / "cec.html",
        "The evaluation kernel's configurations",
        facts,
        list(frame),
        frame.values.tolist(),
        [pareto_figure()],
    )
    print(page)


if __name__ == "__main__":
    main()
