# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Hit rates and pools
#
# **What you will see:** which tier serves the attended tokens: the device window, the hot pool in host memory, or the
# drive; how the hot pool warms up; why tokens miss it; and how three rankings of the pool compare at equal memory.

# %% tags=["parameters"]
task = "chain"  # long answers: over 64 decode steps
tokens = 2048
alpha = 0.1
seed = 2
drive = "/tmp"  # a folder on the drive

# %%
from transformers import logging

from hillinfer.assets import load_embedded
from hillinfer.workbench import Case, LiveRun
from hillinfer.workbench.figures import hits_figure

logging.disable_progress_bar()
model, tokenizer = load_embedded()
case = Case.task(tokenizer, task, tokens, seed)


def run(**options) -> LiveRun:
    one = LiveRun(model, tokenizer, case, "hillinfer", dict(alpha=alpha, drive=drive) | options)
    one.start().result()
    return one


first = run()
print(f"{first.answer!r}, {'right' if first.right else 'wrong'}; {first.split_reason}")

# %% [markdown]
# ## Step by step
#
# A pool miss is either a token that was never in the pool or one that was demoted. Demoted tokens indicate a pool that
# is too small or badly ranked; new tokens indicate that attention has moved on.

# %%
hits_figure(first.counters, f"{task}, {tokens} tokens, alpha {alpha}: by decode step", by="step")

# %% [markdown]
# ## Layer by layer

# %%
hits_figure(first.counters, f"{task}, {tokens} tokens, alpha {alpha}: by layer")

# %% [markdown]
# ## Three rankings, and budgets of host memory
#
# Equal pools, one question. `hits` counts per token and layer, `shared-hits` uses one table for all layers, `lru`
# is the control. Measured on this machine; one question is an illustration, not a benchmark.

# %%
import pandas as pd

rows = []
for placement in ("hits", "shared-hits", "lru"):
    one = run(placement=placement)
    rates, steps = one.figures["rates"], one.figures["steps"]
    rows.append(
        {
            "placement": placement,
            "pool": rates["host"],
            "drive": rates["drive"],
            "of the misses, demoted before": one.counters.total("demoted") / max(1, one.counters.total("drive")),
            "KiB from the drive per token": one.figures["drive_bytes_per_token"] / 1024,
            "swaps per step and layer": one.counters.total("swapped") / len(one.counters.rows),
        }
    )
shares = dict.fromkeys(list(rows[0])[1:4], "{:.1%}") | dict.fromkeys(list(rows[0])[4:], "{:,.0f}")
pd.DataFrame(rows).set_index("placement").style.format(shares)

# %%
import plotly.graph_objects as go

from hillinfer.workbench.palette import COLOURS

sizes = [3, 4, 6, 8, 12]  # MiB of host memory for KV records
served = [run(host_budget=f"{size}MiB").figures["rates"]["drive"] for size in sizes]
figure = go.Figure(go.Scatter(x=sizes, y=served, mode="lines+markers", line_color=COLOURS["drive read"]))
figure.update_layout(template="plotly_white", height=320, title=f"{task}, {tokens} tokens, alpha {alpha}")
figure.update_xaxes(title="host budget, MiB", rangemode="tozero")
figure.update_yaxes(title="served by the drive", tickformat=".0%", rangemode="tozero")

# %% [markdown]
# ## With your own model
#
# Replace the line that loads the model: `model = AutoModelForCausalLM.from_pretrained(...)`, `tokenizer =
# AutoTokenizer.from_pretrained(...)`, of the Llama, Qwen, Mistral or OPT families. For your own text, create the case
# with `Case.text(tokenizer, text, question, max_new_tokens=64)`. To use a separate drive, set `drive` to its folder.
