"""Long-context LLM inference with a KV cache spread over GPU, host memory and a drive."""

import os
import sys

# Spinning threads slow down a busy small machine tenfold or more. These must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer

from hillinfer.commands.bench import bench
from hillinfer.commands.console import clear_errors
from hillinfer.commands.demo import demo
from hillinfer.commands.doctor import doctor
from hillinfer.commands.evaluate import evaluate
from hillinfer.commands.lab import lab
from hillinfer.commands.profile import profile
from hillinfer.commands.replay import replay
from hillinfer.commands.run import run
from hillinfer.commands.stamp import stamp
from hillinfer.commands.systems import systems

COMMANDS = dict(demo=demo, run=run, eval=evaluate, bench=bench, replay=replay, systems=systems)
COMMANDS |= dict(profile=profile, stamp=stamp, doctor=doctor, lab=lab)
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
for name, command in COMMANDS.items():
    app.command(name)(clear_errors()(command))


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
