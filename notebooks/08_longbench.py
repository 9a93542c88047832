# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LongBench
#
# **What you will see:** systems and budgets scored on long-context tasks by LongBench's rules: a table with
# intervals and a paired test against the full cache, accuracy against budget and against bytes, and the models'
# answers. Then the same command continues with more samples, without repeating any.
#
# It runs on the bundled tasks, in LongBench's format. LongBench itself is one option away, at the end. A few
# samples show how it works, not which system is better.

# %% tags=["parameters"]
tasks = "lines_1k,needle_1k,two_hop_1k"  # own: all bundled tasks; longbench-en: LongBench's 16 English ones
systems = "streaming,topk,hillinfer"  # or all; full is always added
alpha = "0.05,0.2"
samples = 2  # of each task
model = "embedded"  # or a folder, or a name on the hub
folder = None  # for the results; None takes a temporary one

# %%
import sys
import tempfile
from pathlib import Path

temporary = tempfile.TemporaryDirectory()  # goes when the kernel ends
python, folder = sys.executable, Path(folder or temporary.name)
setting = f"--model {model} --tasks {tasks} --systems {systems} --alpha {alpha} --out {folder}"

# %% [markdown]
# ## The command
#
# `hillinfer eval` on any shell does the same. Stopped at any moment, it goes on where it was.

# %%
# !{python} -m hillinfer eval {setting} --samples {samples} 2>&1

# %% [markdown]
# ## Accuracy by budget
#
# Bars are 95 % bootstrap intervals over samples; a bar is missing if all samples agree.

# %%
from hillinfer.longbench import report
from hillinfer.longbench.results import read
from hillinfer.workbench.evaluation import budget_figure, bytes_figure, tasks_figure

table, cost, _, facts = report.write(folder)
asked = len({(row["task"], row["id"]) for row in read(folder)})
budget_figure(table, f"{model} model, {asked} questions: accuracy by budget")

# %% [markdown]
# ## Accuracy by bytes
#
# Accuracy against the bytes of KV that a decode step attends to.

# %%
bytes_figure(table.merge(cost), f"{model} model, {asked} questions: accuracy by KV attended to")

# %%
tasks_figure(table, f"{model} model: scores by task, in per cent")

# %% [markdown]
# ## What it costs
#
# Medians over samples, measured in this run.

# %%
cost.drop(columns=["model", "question", "truncated"]).set_index(["system", "alpha"]).style.format("{:,.1f}")

# %% [markdown]
# ## What was answered
#
# Every answer is a line of `results.jsonl`. Read the wrong ones before you trust a score.

# %%
import pandas as pd

answers = pd.DataFrame(read(folder))[["task", "id", "system", "alpha", "pred", "answers", "score"]]
answers.sort_values(["score", "task", "id"]).head(8).style.hide(axis="index").format({"score": "{:.0%}"})

# %% [markdown]
# ## More samples, later
#
# Existing answers are kept, and their questions are not repeated. Add tasks, systems, budgets or models the same way.

# %%
before = len(read(folder))
# !{python} -m hillinfer eval {setting} --samples {samples + 1} > {folder}/second.log 2>&1
print(f"{before} answers were there, now {len(read(folder))}")
table, cost, _, facts = report.write(folder)
report.summary(table, cost)[["system", "alpha", "n", "score", "to full"]].style.hide(axis="index")

# %% [markdown]
# ## With your own model, and LongBench's own data
#
# Set `model` to a folder or a name on the Hub, `tasks` to `longbench-en` and `samples` to 0 (all), add `--data
# data.zip` to the setting, and set `folder` to a permanent one. `--workers 8` or `--cluster dask:HOST:8786` run the
# eval in parallel.
# `docs/longbench.md` has the steps for Llama-3.1-8B on one 24 GB GPU, and what was not run.
