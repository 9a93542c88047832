# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What if: other hardware
#
# **What you will see:** a run recorded here, replayed on machines that you do not have and at sizes that do not
# fit this one; every system on those machines, from 4K to 128K tokens; and how sensitive the answer is to each
# assumed number.
#
# The recording is measured. Everything after it is **modelled**, and labelled so: a device profile names the source
# of every number, and half of them are assumptions. A difference of less than a factor of two is not a result.

# %% tags=["parameters"]
profiles = ["rtx4090-smartssd", "rtx4090-gen4-nvme", "rtx5060ti-16gb-gen5", "laptop-igpu", "h200"]
shape = "llama-3.1-8b"  # hillinfer.systems.shapes.SHAPES has the others
contexts = "4k..128k"  # doubles from the first to the last
systems = ["full", "flexgen", "dualblade", "infinigen", "leoam", "hillinfer"]
alpha = 0.2
task, tokens = "chain", 2048  # of the recorded run
drive = "/tmp"  # a folder on the drive, for the same

# %% [markdown]
# ## The machines

# %%
import pandas as pd

from hillinfer.whatif.devices import find_profile

known = {name: find_profile(name) for name in profiles}
pd.DataFrame(
    [{"profile": name, "box": profile.about, **profile.sources()} for name, profile in known.items()]
).set_index("profile")

# %% [markdown]
# ## A run, recorded here
#
# The replay keeps the order and the dependencies of this run and scales its sizes by the rules in
# `docs/replay.md`. The durations measured here are not used.

# %%
from transformers import logging

from hillinfer.assets import load_embedded, machine
from hillinfer.workbench import Case, LiveRun, show_timeline

logging.disable_progress_bar()
model, tokenizer = load_embedded()
run = LiveRun(model, tokenizer, Case.task(tokenizer, task, tokens, 2), "hillinfer", dict(alpha=alpha, drive=drive))
run.start().result()
print(f"measured on {machine()}: {run.figures['ms_per_token']:.1f} ms per token")

# %% [markdown]
# ## The same run elsewhere

# %%
from hillinfer.systems.shapes import find_shape
from hillinfer.whatif import replay

sizes = {
    "embedded model, as recorded": None,
    f"{shape}, 8K": replay.Target(find_shape(shape), 8192, alpha=alpha),
    f"{shape}, 32K": replay.Target(find_shape(shape), 32768, alpha=alpha),
}
modelled = {
    (name, size): replay.replay(run.timeline, profile, target, most=2)
    for name, profile in known.items()
    for size, target in sizes.items()
}
rows = {key: 1e3 * replay.modelled_seconds(timeline)[-1] for key, timeline in modelled.items()}
pd.Series(rows, name="ms per step (modelled)").unstack()[list(sizes)].loc[profiles].style.format("{:,.1f}")

# %% [markdown]
# Where the time goes on the first machine: modelled spans are pale and dashed, and marked with `~`. Zoom in with the
# wheel or W.

# %%
show_timeline(modelled[profiles[0], f"{shape}, 32K"])

# %% [markdown]
# ## Every system, from short to long
#
# No run is replayed here: a rule states the traffic of each system (`hillinfer/whatif/rules.py`). A line ends where
# the KV no longer fits the machine. In a browser, the menu selects the machine.

# %%
from hillinfer.whatif import sweep
from hillinfer.workbench.replays import sweep_figure

cells = sweep.cells(profiles, [shape], systems, sweep.parse_sizes(contexts), alphas=[alpha])
frame = sweep.sweep(cells, jobs=1)
sweep_figure(frame, title=f"A decode step of {shape}, modelled")

# %% [markdown]
# ## Sensitivity
#
# Every assumed number of the first machine, halved and doubled, one at a time.

# %%
import plotly.graph_objects as go

from hillinfer.systems.hillinfer.profile import Rate
from hillinfer.workbench.figures import LAYOUT
from hillinfer.workbench.palette import COLOURS

base, cell = known[profiles[0]], sweep.Cell(profiles[0], shape, "hillinfer", 32768, alpha=alpha)
plain, effects = sweep.evaluate(cell, base)["ms"], {}
for part, numbers in base.parts.items():
    for number, rate in numbers.items():
        if rate.source.startswith("assumed"):
            changed = [Rate(tuple(f * v for v in rate.values), rate.source, rate.blocks) for f in (0.5, 2)]
            what_if = [base.with_numbers("what if", **{f"{part}_{number}": one}) for one in changed]
            effects[f"{part}.{number}"] = [sweep.evaluate(cell, own)["ms"] / plain - 1 for own in what_if]
order = sorted(effects, key=lambda name: max(map(abs, effects[name])))
figure = go.Figure()
for i, (name, colour) in enumerate({"halved": COLOURS["link"], "doubled": COLOURS["drive read"]}.items()):
    figure.add_bar(y=order, x=[effects[n][i] for n in order], name=name, orientation="h", marker_color=colour)
title = f"hillinfer, {shape}, 32K tokens on {profiles[0]}: {plain:,.0f} ms per step (modelled)"
figure.update_layout(LAYOUT, title=title, height=420, margin_l=130)
figure.update_xaxes(title="change of a step's time, modelled", tickformat="+.0%")

# %% [markdown]
# ## With your own model and machine
#
# `hillinfer profile --drive FOLDER` measures this machine and writes `out/this-machine.toml`; add `this-machine` to
# the profiles. Record a run of your own model with `hillinfer run --model M --prompt-file long.txt --drive FOLDER
# --trace trace.json`, or save one with the dashboard's *Trace* button, and load it with `sweep.load_run(path)`. To
# describe another machine, copy and edit one of the files in `hillinfer/whatif/profiles/`.
