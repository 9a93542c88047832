# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The selection frontier
#
# **What you will see:** how far each way of choosing tokens moves a real model's next-token distribution, against the
# share of tokens it reads; which layer and head lose most; and the same for a model of your own.
#
# The first two figures show kept results of Qwen2.5-Coder-0.5B-Instruct on LongBench rows (`docs/real-models.md` has
# the command). Divergence tells policies apart with a few hundred answer tokens, where a dozen scores cannot.

# %% tags=["parameters"]
results = None  # the kept ones; or fidelity.csv of your own `hillinfer eval --fidelity reference`
question = "prefilled"  # exactly, with the document; or stepwise: fed through the system itself
model = "embedded"  # for the last figures: or a folder, a GGUF file or a name on the hub
alpha = 0.1

# %%
import pandas as pd

from hillinfer.assets import data_folder
from hillinfer.workbench.evaluation import fidelity_figure

table = pd.read_csv(results or data_folder("notebooks") / "kept" / "qwen2.5-coder-0.5b.csv")
rows = table[table.question == question]
samples, tokens = rows.samples.max(), rows.tokens.max()
fidelity_figure(rows, f"{rows.model.iloc[0]}, {samples} LongBench rows, {tokens:,} answer tokens")

# %% [markdown]
# Bars are 95 % bootstrap intervals over rows. A token of attention costs the same bytes in every system, so the lower
# line wins. `oracle` chooses by the exact weights, which no system can know without reading all keys.
#
# ## Against the bytes read
#
# Choosing reads as well. Computed, not measured, for KV in 16 bits: what a step reads of an index over all tokens, as a
# share of their KV. `topk` scores INT8 codes of all keys, `quest` the minimum and maximum of each page of 16,
# `infinigen` a fifth of the columns of all keys, `oracle` all keys; the others read no index. `leoam` is left out: how
# far it goes down its tree depends on the text. By tokens `topk` is far ahead; by bytes it begins at a quarter of the
# KV, and below that the coarse indices lead. INT4 codes halve it; a drive that scores keeps it off the bus.

# %%
index = {"topk": 1 / 4, "quest": 1 / 16, "infinigen": 1 / 10, "oracle": 1 / 2}
read = rows.assign(attended=rows.attended + 100 * rows.system.map(index).fillna(0))
figure = fidelity_figure(read, "KL by bytes read: KV measured, index computed")
figure.update_traces(visible=False, selector=dict(name="leoam"))
figure.update_xaxes(title="KV and index that a step reads, % of all KV")

# %% [markdown]
# ## One budget at a time
#
# Move the slider to another alpha. The scale is logarithmic.

# %%
import plotly.express as px

from hillinfer.workbench.figures import LOG
from hillinfer.workbench.palette import LINES

chosen = rows[rows.attended < 100].sort_values(["alpha", "kl"])
frames = dict(animation_frame="alpha", hover_data=["agree", "mass"], color_discrete_sequence=LINES[:1])
figure = px.bar(chosen, x="system", y="kl", log_y=True, **frames)
figure.update_layout(yaxis_title="KL to full, nats a token", template="simple_white", updatemenus=[], height=420)
figure.update_yaxes(range=[-2.5, 1.2], **LOG)

# %% [markdown]
# ## Where attention is lost
#
# The share of a head's exact attention that the selection leaves out, mean over the decode steps of one question.

# %%
import numpy as np
from transformers import logging

from hillinfer import load_model
from hillinfer.assets import load_embedded
from hillinfer.workbench import Case, LiveRun
from hillinfer.workbench.observe import AttentionRecord

logging.disable_progress_bar()
loaded, tokenizer = load_embedded() if model == "embedded" else load_model(model)
record = AttentionRecord(exact=True)
case = Case.task(tokenizer, "chain", 2048, 2)
LiveRun(loaded, tokenizer, case, "topk", dict(alpha=alpha), record).start().result()
recall = np.mean([[layers[i].recall for i in sorted(layers)] for layers in record.steps.values()], 0)
labels = dict(x="head", y="layer", color="lost, %")
figure = px.imshow(100 * (1 - recall), color_continuous_scale="Cividis", labels=labels, aspect="auto", height=360)
figure.update_xaxes(dtick=1).update_layout(margin=dict(l=60, r=20, t=20, b=50))

# %% [markdown]
# The head that loses most, over the document: its attention by blocks of positions, and what was selected.

# %%
from hillinfer.workbench.figures import attention_figure

layer, head = np.unravel_index(recall.argmin(), recall.shape)
attention_figure(record, int(layer), int(head))

# %% [markdown]
# ## With your own model
#
# Set `model` to a folder, a `.gguf` file or a name on the hub. For the frontier itself:
# `hillinfer eval --model NAME --tasks longbench-en --systems topk,quest,streaming --alpha 0.05,0.1,0.2 --fidelity
# reference --no-answers --out out/frontier`, and set `results` to `out/frontier/fidelity.csv`.
