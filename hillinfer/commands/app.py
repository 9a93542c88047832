"""Long-context LLM inference with a KV cache spread over GPU, host memory and a drive."""

import os

# Spinning threads slow down a busy small machine tenfold or more. These must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # transformers unpacks GGUF under a bar of its own

import typer

from hillinfer.commands import bench, demo, doctor, evaluate, lab, profile, replay, run, stamp, store, systems
from hillinfer.commands.console import clear_errors

COMMANDS = dict(demo=demo.demo, run=run.run, eval=evaluate.evaluate, bench=bench.bench, replay=replay.replay)
COMMANDS |= dict(systems=systems.systems, profile=profile.profile, stamp=stamp.stamp, doctor=doctor.doctor, lab=lab.lab)
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
for name, command in COMMANDS.items():
    app.command(name)(clear_errors()(command))
app.add_typer(store.app, name="store")


def main() -> None:
    app()
