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
# **What you will see:** what a budget costs in accuracy, and why. The accuracy board asks systems the questions of
# long-context tasks, scores the answers by LongBench's rules, and fills a table with intervals and a paired
# difference to full attention. Every cell opens its answers, with the first token at which a system parts from full
# attention, and that token opens in the dashboard.
#
# It runs on the bundled tasks, in LongBench's format, with the bundled model. LongBench itself and a real model are
# two fields of the board. A few samples show how it works, not which system is better.

# %% tags=["parameters"]
model = "embedded"  # or a folder, a hub id or a .gguf file
data = ""  # folder or data.zip with LongBench's rows, with tasks such as ["hotpotqa", "qasper"]
tasks = ["lines_1k", "needle_1k", "two_hop_1k"]
systems = ["streaming", "topk", "hillinfer"]  # full is always added
alphas = "0.05, 0.2"
samples = 2  # of each task
folder = None  # for the results; None takes a temporary one

# %% [markdown]
# ## The accuracy board
#
# Press **Run**. **Stop** ends at once, and what was answered is kept: **Run** goes on from there, also after a
# restart of the kernel, and repeats nothing. Add a system, a task or samples at any time, and press **Run** again.
# Click a score to read the answers behind it.

# %%
import tempfile
from pathlib import Path

from hillinfer.workbench import AccuracyBoard

temporary = tempfile.TemporaryDirectory()  # goes when the kernel ends
folder = Path(folder or temporary.name)
board = AccuracyBoard(folder)
board.model.value, board.data.value = model, data
board.origin.value = "LongBench" if data else "the project's own"
board.tasks.value, board.systems.value = tasks, systems
board.alphas.value, board.samples.value = alphas, samples
board.show()

# %% [markdown]
# ## The same from code
#
# `run` waits for the answers. The files in the folder are those of `hillinfer eval`, which can continue them, and the
# other way round. An eval that runs elsewhere is followed with **Watch**.

# %%
rows = board.run()
print(f"{len(rows)} answers; the same in a terminal: hillinfer eval --systems {','.join(board.systems.value)} ...")

# %% [markdown]
# ## Accuracy by budget
#
# Bars are 95 % bootstrap intervals over samples; a bar is missing if all samples agree.

# %%
from hillinfer.longbench import report
from hillinfer.workbench.evaluation import budget_figure, bytes_figure, tasks_figure

table, cost, *_ = report.write(folder)
asked = len({(row["task"], row["id"]) for row in rows})
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
# ## Why was an answer wrong?
#
# The same as a click on a score: the question, the reference, and all answers side by side.

# %%
board.table.cell = {"task": tasks[-1], "system": systems[0], "alpha": float(alphas.split(",")[0]), "sample": 0}
answers = board.table.answers
print("question: ", answers["input"], "\nreference:", answers["reference"])
for one in answers["answers"]:
    where = "as full" if one["parts"] is None else f"parts at token {one['parts'] + 1}"
    print(f"{one['system']:10} {one['alpha'] or 1:<5g} {where:18} {one['same']}|{one['token']}{one['rest']}")

# %% [markdown]
# That token in the dashboard: the question is asked again, and the step that chose the token is marked in all views.
# If attention went elsewhere, the answer's place in the text was not among the selected tokens.

# %%
parted = [i for i, one in enumerate(answers["answers"]) if one["parts"] is not None]
run = board.open_token(parted[0] if parted else 0)
print(run.system, "answers:", run.result())
board.workbench.join_painter()

# %% [markdown]
# ## More, later
#
# Existing answers are kept, and their questions are not repeated.

# %%
before = len(board.rows)
board.samples.value = samples + 1
print(f"{before} answers were there, now {len(board.run())}")

# %% [markdown]
# ## With your own model, and LongBench's own data
#
# Write a folder, a hub id or a `.gguf` file into *model*, choose *LongBench* as the tasks' origin and name the folder
# or `data.zip` of its rows; without one they come from the Hub. Name a permanent folder for the results, and set
# *samples* to 0 for all. On many processes or a cluster use `hillinfer eval` with `--workers 8` or `--cluster
# dask:HOST:8786`, and watch it here. `docs/longbench.md` has the steps for Llama-3.1-8B on one 24 GB GPU, and what was
# not run.
