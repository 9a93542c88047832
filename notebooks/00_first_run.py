# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first run
#
# **What you will see:** a small language model answers a question about a document of 2,000 tokens, while its KV
# cache is spread over host memory and a drive. As tokens are generated, you see what each attention head attends to,
# which tier serves it, and what the CPU and the drive do at each moment. Then another system answers the same
# question, for comparison.
#
# Nothing is downloaded: the model ships with the package. It is small, so its speed says little about large
# models; the mechanics are the same.

# %% tags=["parameters"]
task = "chain"  # one of the synthetic tasks: lines, needle, two_hop, passage, chain, majority
tokens = 2048  # length of the document
alpha = 0.2  # share of the tokens that a decode step attends to
seed = 2  # makes the document and the question

# %% [markdown]
# ## The dashboard
#
# Press **Run**. **Stop**, or the kernel's interrupt button, ends a run after the current token. To compare, select
# another system and press **Compare**: it runs next to the last one. Click a token, a step, a head or a moment to
# mark it in all views.

# %%
from hillinfer.workbench import Workbench

workbench = Workbench()
workbench.task.value, workbench.tokens.value = task, tokens
workbench.alpha.value, workbench.seed.value = alpha, seed
workbench.show()

# %% [markdown]
# ## The same from code
#
# Every control is a Python object with a `value`, and `run` waits for the answer. The notebook's test works this way.

# %%
workbench.system.value = "hillinfer"
print("answer:", workbench.run())
print("right: ", workbench.runs[-1].right)

# %% [markdown]
# Next to it, the reference `full` keeps all KV in memory and attends to every token. At this size it is faster,
# because it needs no drive. Compare the bytes in memory.

# %%
workbench.system.value = "full"
print("answer:", workbench.run(beside=True))

# %%
from hillinfer.workbench.differences import compare_figures

first, second = workbench.runs
for name, one, other, form in compare_figures(first, second):
    print(f"{name:40} {one:{form}}".ljust(56), f"{other:{form}}".rjust(12))

# %% [markdown]
# ## Why was a token slow?
#
# Click a token: the pane beside the timeline says in a sentence and a table what its step waited for, against the
# median step. The same from code, for the whole run and for its slowest step.

# %%
import hillinfer

why = hillinfer.explain(first)
print(why.sentence)
print(hillinfer.explain(first, why.step))

# %% [markdown]
# ## With your own model
#
# Write a folder, a hub id or a `.gguf` file into *model* and press **Load**, or pass what you have loaded:
# `Workbench(model, tokenizer, drive="/mnt/nvme")`. As *prompt* choose a row of LongBench, LongEval or RULER, or an own
# text or file (`.txt`, `.md`, `.pdf`). With a session file, a long document is prefilled only once: set
# `workbench.session.value = "report.kv"`. The first run creates it, later runs open it.
#
# Next: `01_attention_sparsity`.
