# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Timelines and overlap
#
# **What you will see:** what the CPU and the drive do at each moment of a run; how much of the shorter side, compute or
# transfer, overlaps with the other; and the same run with a drive that scores keys itself, also paced to a SmartSSD's
# rates.

# %% tags=["parameters"]
task = "chain"
tokens = 2048
alpha = 0.2
seed = 2
drive = "/tmp"  # a folder on the drive

# %%
from transformers import logging

from hillinfer.assets import load_embedded, machine
from hillinfer.workbench import Case, LiveRun, show_timeline

logging.disable_progress_bar()
model, tokenizer = load_embedded()
case = Case.task(tokenizer, task, tokens, seed)
ways = {
    "SSD": dict(lookahead=False),
    "SSD, looking ahead": dict(lookahead=True),
    "emulated drive": dict(drive_kind="emulated", lookahead=False),
    "emulated, SmartSSD rates": dict(drive_kind="emulated", paced=True, lookahead=False),
}
runs = {}
for name, options in ways.items():
    runs[name] = LiveRun(model, tokenizer, case, "hillinfer", dict(alpha=alpha, drive=drive) | options)
    runs[name].start().result()
print("measured on", machine())

# %% [markdown]
# ## The numbers
#
# Busy time of each lane per token, and the overlap. The busiest lane is a lower bound on the time per token. The
# emulated drive runs on this machine, so unlike a real one it uses CPU time.

# %%
import pandas as pd

rows = []
for name, run in runs.items():
    lanes = {f"{lane}, ms": ms for lane, (ms, _) in run.figures["lanes"].items() if lane in ("cpu", "drive")}
    rows.append(
        {"drive": name, "ms per token": run.figures["ms_per_token"], **lanes, "overlap": run.figures["overlap"]}
    )
table = pd.DataFrame(rows).set_index("drive")
table.style.format("{:.1f}").format("{:.0%}", subset=["overlap"])

# %% [markdown]
# ## The timeline
#
# Zoom with the wheel or W and S, pan by dragging or with A and D, press 0 to show everything, N and P to step through
# spans, T for a table. The line above the timeline shows the overlap in the current view. *Perfetto* opens
# all spans in [ui.perfetto.dev](https://ui.perfetto.dev), or saves them where there is no network; *Trace* saves them.

# %%
show_timeline(runs["SSD, looking ahead"].timeline)

# %%
show_timeline(runs["emulated, SmartSSD rates"].timeline)

# %% [markdown]
# ## Time by kind of work
#
# All spans are rows of a DataFrame; nothing is sampled or dropped.

# %%
frame = runs["SSD"].timeline.frame()
total = frame.groupby(["lane", "kind"]).agg(ms=("ms", "sum"), spans=("ms", "size"), bytes=("bytes", "sum"))
total.sort_values("ms", ascending=False).style.format({"ms": "{:,.1f}", "bytes": "{:,.0f}"})

# %% [markdown]
# ## With your own model
#
# Replace the line that loads the model: `model = AutoModelForCausalLM.from_pretrained(...)`, `tokenizer =
# AutoTokenizer.from_pretrained(...)`, of the Llama, Qwen, Mistral or OPT families. For your own text, create the case
# with `Case.text(tokenizer, text, question, max_new_tokens=64)`. To use a separate drive, set `drive` to its folder.
