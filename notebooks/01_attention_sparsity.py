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
# **What you will see:** which heads of a model attend to few tokens and which to many; where in a long document they
# attend; and how much of the exact attention falls on the tokens selected by INT8 scores.
#
# For this analysis, exact attention over all cached tokens is computed in every step, which reads all KV. The dashboard
# does this only on request.

# %% tags=["parameters"]
task = "chain"  # lines, needle, two_hop, passage, chain, majority
tokens = 2048  # length of the document
alpha = 0.2  # share of the tokens that a decode step attends to
seed = 2  # makes the document and the question

# %%
from transformers import logging

from hillinfer.assets import load_embedded
from hillinfer.workbench import AttentionMap, Case, LiveRun
from hillinfer.workbench.observe import AttentionRecord

logging.disable_progress_bar()
model, tokenizer = load_embedded()
record = AttentionRecord(exact=True, map=AttentionMap())
run = LiveRun(model, tokenizer, Case.task(tokenizer, task, tokens, seed), "topk", dict(alpha=alpha), record)
print("answer:", run.start().result())
print("right: ", run.right)

# %% [markdown]
# ## How many tokens a head needs
#
# For each layer and head: the smallest share of the cached tokens that holds 90 % of its attention, mean over all
# decode steps. Dark heads attend to a handful of tokens, most of them to the attention sink; light heads spread out.

# %%
from hillinfer.workbench.figures import attention_figure, sparsity_figure

sparsity_figure(record, f"{task}, {tokens} tokens: tokens that hold 90 % of the attention")

# %% [markdown]
# ## What real models look at
#
# The same for two real models on LongBench rows, beside this run: kept results, which `python -m
# benchmarks.head_sparsity MODEL --rows FOLDER` measures again. Most heads need a few per cent of the tokens; those
# that need most lie in the first layers.

# %%
import pandas as pd

from hillinfer.assets import data_folder
from hillinfer.workbench.published import sparsity_by_model

kept = pd.read_csv(data_folder("notebooks") / "kept" / "head-sparsity.csv")
heads = {
    name: part.pivot(index="layer", columns="head", values="needed").to_numpy()
    for name, part in kept.groupby("model", sort=False)
}
setting = f"Real models: mean over the decode steps of the shortest row each of {kept.tasks[0].replace(' ', ' and ')}, "
setting += (
    f"about {max(kept.tokens.str.split().explode().astype(int)):,} tokens at most. This run: {task}, {tokens} tokens."
)
sparsity_by_model({"this run": record} | heads, setting)

# %% [markdown]
# ## Recall of the selection
#
# The share of the exact attention that falls on the selected tokens, by layer. At alpha 1 it would be 100 %.

# %%
import numpy as np

recall = np.array([[layers[layer].recall for layer in sorted(layers)] for layers in record.steps.values()])
pd.DataFrame(
    {
        "mean of heads": recall.mean((0, 2)),
        "lowest head": recall.mean(0).min(1),
        "lowest step and head": recall.min((0, 2)),
    }
).rename_axis("layer").style.format("{:.1%}")

# %% [markdown]
# ## One head over the document
#
# Attention by blocks of positions, on a logarithmic scale, and the selected share of each block below. This is the
# head with the widest attention.

# %%
layer, head = np.unravel_index(record.needed().argmax(), record.needed().shape)
attention_figure(record, int(layer), int(head))

# %% [markdown]
# ## Every position, layer and head
#
# The whole text from left to right, a row for each layer, mean over the decode steps; below each row what was selected,
# and where it lay. The wheel zooms to the single token, pointing shows its text, a click on a layer opens its heads.
# The map takes at most 64 MB, at 128K tokens too. Here the first two layers look at the newest tokens only.

# %%
from hillinfer.workbench import show_attention

show_attention(run)

# %% [markdown]
# ## Linked views
#
# Click a cell of the heat map, a step, or a moment of the timeline.

# %%
from hillinfer.workbench import show_record

show_record(run.timeline, run.counters, record)

# %% [markdown]
# ## With your own model
#
# Replace the line that loads the model: `model, tokenizer = hillinfer.load_model(NAME)` takes a folder, a hub id or a
# `.gguf` file. For your own text, create the case with `Case.text(tokenizer, text, question, max_new_tokens=64)`, for a
# row of LongBench with `Case.row`. To use a separate drive, set `drive` to its folder.
