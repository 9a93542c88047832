# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own policy
#
# **What you will see:** a new selection policy in one cell, with its accuracy and bytes next to the other systems.
# From then on it is a system like any other: in the dashboard, in `hillinfer.list_systems()`, in all tables here.
#
# A policy answers one question for each decode step and layer: which of the n cached tokens to attend to?

# %% tags=["parameters"]
tasks = {"lines_1k": 3, "needle_1k": 3}
alpha = 0.1
compared_with = ["full", "streaming", "topk"]

# %% [markdown]
# ## The policy
#
# `step.n` tokens are cached and `step.budget` of them may be chosen; `step.scores()` ranks all keys by their
# INT8 codes, `(n,)`, higher is better; `step.near()` gives the tokens that the device holds anyway. Return sorted,
# distinct positions. This one selects whole blocks of sixteen neighbours: fewer and larger reads from a drive, if the
# answers stay correct.

# %%
import numpy as np

import hillinfer

BLOCK = 16


class Blocks(hillinfer.Policy):
    """Whole blocks of sixteen tokens, by their best token."""

    def select(self, step: hillinfer.Step) -> np.ndarray | None:
        if step.budget >= step.n:
            return None
        near = step.near()[-step.budget :]
        best = np.maximum.reduceat(step.scores(), np.arange(0, step.n, BLOCK))
        order = (np.argsort(-best)[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        order = order[(order < step.n) & ~np.isin(order, near)]
        return np.sort(np.concatenate((near, order[: step.budget - len(near)])))


hillinfer.POLICIES["blocks"] = Blocks

# %% [markdown]
# ## Compared at once

# %%
import pandas as pd
from transformers import logging

from hillinfer.assets import load_embedded
from hillinfer.longbench.comparison import compare, demo_records

logging.disable_progress_bar()
model, tokenizer = load_embedded()
records = demo_records(tasks)
results = compare(model, tokenizer, records, [*compared_with, "blocks"], {"alpha": alpha})
rows = [
    {"system": r.system, "right": r.accuracy, "attended": r.mean("attended"), "ms per token": r.median("ms_per_token")}
    for r in results
]
table = pd.DataFrame(rows).set_index("system")
table.style.format({"right": "{:.0%}", "attended": "{:,.0f}", "ms per token": "{:.1f}"})

# %%
from hillinfer.longbench.comparison import floor
from hillinfer.workbench.figures import systems_figure

title = f"{len(records)} questions of 1K tokens, alpha {alpha}"
systems_figure([r.system for r in results], [r.accuracy for r in results], floor(records), title)

# %% [markdown]
# ## Look at what it does
#
# The selected tokens, next to exact attention.

# %%
from hillinfer.workbench import Case, LiveRun, show_record
from hillinfer.workbench.observe import AttentionRecord

record = AttentionRecord(exact=True)
run = LiveRun(model, tokenizer, Case.task(tokenizer, "lines", 1024, 2), "blocks", dict(alpha=alpha), record)
print(run.start().result(), "right" if run.right else "wrong")
show_record(run.timeline, run.counters, record)

# %% [markdown]
# ## To keep it
#
# Put the class into a file in `hillinfer/evaluator/policies/`, with one line in the registry there: the tests
# then cover it automatically on all model families and tiers. With your own model: replace the line with
# `load_embedded`, and give `compare` records of your own.
