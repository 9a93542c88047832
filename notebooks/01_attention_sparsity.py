# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where attention goes
#
# **What you will see:** which heads of a model look at a few tokens and which at many; where in a long document
# they look; and whether the tokens that the cheap INT8 scores choose are those that exact attention would have
# wanted.
#
# Exact attention over all cached tokens is computed at every step here, for study: it reads all the KV. The
# dashboard does this only when asked.

# %% tags=["parameters"]
task = "chain"  # lines, needle, two_hop, passage, chain, majority
tokens = 2048  # length of the document
alpha = 0.2  # share of the tokens that a decode step attends to
seed = 2  # makes the document and the question

# %%
from transformers import logging

from hillinfer.assets import load_embedded
from hillinfer.workbench import Case, LiveRun
from hillinfer.workbench.observe import AttentionRecord

logging.disable_progress_bar()
model, tokenizer = load_embedded()
record = AttentionRecord(exact=True)
run = LiveRun(model, tokenizer, Case.task(tokenizer, task, tokens, seed), "topk", dict(alpha=alpha), record)
print("answer:", run.start().result())
print("right: ", run.right)

# %% [markdown]
# ## How many tokens a head needs
#
# For each layer and head, the smallest share of the cached tokens that holds 90 % of its attention, mean over all
# decode steps. Dark heads look at a handful of tokens, most of them at the very first one; light heads spread.

# %%
from hillinfer.workbench.figures import attention_figure, sparsity_figure

sparsity_figure(record, f"{task}, {tokens} tokens: tokens that hold 90 % of the attention")

# %% [markdown]
# ## What the selection catches
#
# The share of the exact attention that falls on the chosen tokens, lowest head of each layer. At alpha 1 it would
# be 100 %.

# %%
import numpy as np
import pandas as pd

caught = np.array([[layers[layer].recall for layer in sorted(layers)] for layers in record.steps.values()])
pd.DataFrame(
    {
        "mean of heads": caught.mean((0, 2)),
        "lowest head": caught.mean(0).min(1),
        "lowest step and head": caught.min((0, 2)),
    }
).rename_axis("layer").style.format("{:.1%}")

# %% [markdown]
# ## One head over the document
#
# Attention in blocks of positions, on a logarithmic scale, and below it how much of each block was chosen. This
# is the head that spreads most.

# %%
layer, head = np.unravel_index(record.needed().argmax(), record.needed().shape)
attention_figure(record, int(layer), int(head))

# %% [markdown]
# ## All of it, linked
#
# Click a cell of the heat map, a step or a moment of the timeline.

# %%
from hillinfer.workbench import show_record

show_record(run.timeline, run.counters, record)

# %% [markdown]
# ## With your own model
#
# Replace the line that loads the model: `model = AutoModelForCausalLM.from_pretrained(...)`, `tokenizer =
# AutoTokenizer.from_pretrained(...)`, of the Llama, Qwen, Mistral or OPT families. For your own text, make the
# case with `Case.text(tokenizer, text, question, max_new_tokens=64)`; on a drive of its own, name it in `drive`.
