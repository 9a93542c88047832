# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Systems compared
#
# **What you will see:** all installed systems answer the same questions, in LongBench's format, over new documents. You
# see the accuracy of each system against the KV that its attention reads per token, and its memory.
#
# A handful of questions gives an impression, not a ranking. For a ranking, raise `questions`.

# %% tags=["parameters"]
tasks = {"lines_1k": 1, "needle_1k": 1, "two_hop_1k": 1}  # file of data/tasks: how many of its questions
alpha = 0.2
systems = None  # names, or None for all that hillinfer.list_systems() has
drive = "/tmp"  # a folder on the drive

# %%
import pandas as pd
from transformers import logging

import hillinfer
from hillinfer.assets import load_embedded, machine
from hillinfer.longbench.comparison import compare, demo_records, floor

logging.disable_progress_bar()
model, tokenizer = load_embedded()
records = demo_records(tasks)
known = hillinfer.list_systems()
wanted = systems or list(known)
results = []
for name in wanted:
    place = {"drive": drive} if known[name].needs_drive else {}
    results += compare(model, tokenizer, records, [name], {"alpha": alpha} | place)
print(f"{len(records)} questions, alpha {alpha}; measured on {machine()}")

# %%
record_bytes = 2 * model.config.num_key_value_heads * model.config.head_dim * 4 * model.config.num_hidden_layers
rows = [
    {
        "system": result.system,
        "right": result.accuracy,
        "tokens attended": result.mean("attended"),
        "KV read, MiB per token": result.mean("attended") * record_bytes / 2**20,
        "from the drive, MiB per token": result.mean("drive_bytes_per_token") / 2**20,
        "KV, codes, tables in memory, MiB": result.memory() / 2**20,
        "ms per token": result.median("ms_per_token"),
    }
    for result in results
]
table = pd.DataFrame(rows).set_index("system").sort_values(["right", "KV read, MiB per token"], ascending=[False, True])
print(f"guessing among the entries that share half of the queried key would score {floor(records):.0%}")
table.style.format("{:,.1f}").format("{:.0%}", subset=["right"]).format("{:,.0f}", subset=["tokens attended"])

# %% [markdown]
# ## Accuracy against bytes
#
# Up and left is better. Systems that attend to equally many tokens are on one vertical line; they differ in which
# tokens they select.

# %%
from hillinfer.workbench.figures import tradeoff_figure

names = list(table.index)
read = [value * 2**20 for value in table["KV read, MiB per token"]]
tradeoff_figure(names, read, list(table["right"]), f"{len(records)} questions of 1K tokens, alpha {alpha}")

# %% [markdown]
# ## With your own model and questions
#
# `compare` takes any model, and records with LongBench's eight fields: `input`, `context`, `answers`, `length`,
# `dataset`, `language`, `all_classes`, `_id`. `hillinfer demo --systems full,streaming,hillinfer` does the same
# on the command line and writes a report.
