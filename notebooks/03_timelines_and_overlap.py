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
# **What you will see:** what the processor and the drive did at each moment of a run; how much of the shorter
# side, computing or moving, was hidden behind the other; and the same run with a drive that scores keys itself,
# and with that drive paced to a SmartSSD's rates.

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
# Busy time of each lane per token, and the overlap. A lane's busy time is a bound: a token cannot take less than
# its busiest lane. The emulated drive is a process on this machine, so it takes time from the processor that a
# real one would not.

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
# Wheel or W and S to zoom, drag or A and D to pan, 0 for everything, N and P to step through spans, T for a
# table. The line above says how much of what is in view overlaps. *Perfetto* saves a trace for
# [ui.perfetto.dev](https://ui.perfetto.dev).

# %%
show_timeline(runs["SSD, looking ahead"].timeline)

# %%
show_timeline(runs["emulated, SmartSSD rates"].timeline)

# %% [markdown]
# ## What the time goes into
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
# AutoTokenizer.from_pretrained(...)`, of the Llama, Qwen, Mistral or OPT families. For your own text, make the
# case with `Case.text(tokenizer, text, question, max_new_tokens=64)`; on a drive of its own, name it in `drive`.
