# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # SmartSSD explorer
#
# **What you will see:** the area and the scoring rate of the evaluation kernel inside a SmartSSD (HillInfer's CEC),
# for each configuration; when the drive beats a plain SSD and when it does not; how much of the KV should stay in the
# host; and the whole pipeline over an emulated card.
#
# Three kinds of numbers, each labelled: cycles are **simulated** and areas **synthesised** from the Verilog in
# `fpga/`; rates are **modelled** from them at an assumed clock; the last section is **measured** here, with an
# emulated drive. No card was used.

# %% tags=["parameters"]
clock = 300e6  # Hz, assumed: no timing tool was used
memory = "DDR4 measured"  # or "DDR4 peak", "NAND", "NAND, one stream"
shape = "llama-3.1-8b"
alpha = 0.2
seed = 2
task, length = "chain", 2048  # of the run over the emulated card
drive = "/tmp"  # a folder on the drive, for its files

# %% [markdown]
# ## The configurations
#
# Area in parentheses is the share of the card's FPGA. Recall is the share of the truly best 10 % and 20 % of the
# tokens that the key codes find, on the embedded model.

# %%
from hillinfer.workbench.cec import cec_frame, pareto_figure

cec_frame(clock).set_index("kernel").transpose()

# %% [markdown]
# ## Rate against area
#
# Up and left is better. INT4 scores twice as many keys per byte read, at a lower recall.

# %%
pareto_figure(memory, clock)

# %% [markdown]
# ## Scoring time of a decode step
#
# The time to score every cached key once, all layers and KV heads. Dotted where the codes exceed the card's 4 GB of
# DRAM and are read from flash.

# %%
import plotly.graph_objects as go

from hillinfer.systems.hillinfer.cec import choose
from hillinfer.systems.shapes import find_shape
from hillinfer.whatif.devices import find_profile
from hillinfer.workbench.cec import MEMORIES, tokens_per_second
from hillinfer.workbench.figures import LAYOUT
from hillinfer.workbench.palette import COLOURS

model_shape, room = find_shape(shape), find_profile("rtx4090-smartssd").get("scorer.memory")
contexts = [2**i * 1024 for i in range(2, 10)]
figure = go.Figure()
for bits, colour in ((8, COLOURS["link"]), (4, COLOURS["choose"])):
    kernel = choose(bits, model_shape.head_dim)
    fits = [n for n in contexts if n * model_shape.code_bytes(bits) * model_shape.layers <= room]
    for place, sizes in ((memory, fits), ("NAND", contexts[max(0, len(fits) - 1) :])):
        rate = tokens_per_second(kernel, MEMORIES[place], clock)
        ms = [1e3 * n * model_shape.layers * model_shape.kv_heads / rate for n in sizes]
        dash = "solid" if place == memory else "dot"
        figure.add_scatter(x=sizes, y=ms, name=f"INT{bits}, {place}", line=dict(color=colour, dash=dash))
title = f"Scoring all keys of {shape} in the drive, {clock / 1e6:.0f} MHz assumed"
figure.update_layout(LAYOUT, title=title)
ticks = [f"{n // 1024}K" for n in contexts]
figure.update_xaxes(type="log", title="cached tokens", tickvals=contexts, ticktext=ticks)
figure.update_yaxes(type="log", title="ms per step (modelled)")

# %% [markdown]
# ## Against a plain drive
#
# Seconds to score every cold key once, with 4 GiB of host memory for KV. A plain Gen4 drive reads twice as fast as
# the card's flash, so the card wins only while its DRAM holds the codes. The shortest time of each row is marked.

# %%
import pandas as pd

from hillinfer.whatif.scenario import Scenario

card, plain = find_profile("rtx4090-smartssd"), find_profile("rtx4090-gen4-nvme")
nand, dram = card.get("scorer.nand_read"), card.get("scorer.dram_read")
to_host = min(plain.get("drive.read"), plain.score_rate)
rows = {}
for name, context, batch in (("qwen-7b", 16384, 1), ("qwen-7b", 16384, 8), (shape, 16384, 8), (shape, 131072, 4)):
    case = Scenario(card, find_shape(name), context, batch, alpha, host=4 * 2**30)
    cold = 1 - case.held()
    keys, codes = cold * case.kv / 2, cold * case.codes * case.shape.layers
    in_dram = min(codes, room)
    rows[name, context, batch] = {
        "card, keys on NAND": keys / nand,
        "card, codes on NAND": codes / nand,
        "card, codes in DRAM": max(in_dram / dram, (codes - in_dram) / nand),
        "Gen4, keys to host": keys / to_host,
        "Gen4, codes to host": codes / to_host,
    }
truth = pd.DataFrame(rows).transpose().rename_axis(["model", "context", "batch"])
truth.style.format("{:.2f}").highlight_min(axis=1, props="font-weight: bold; text-decoration: underline")

# %% [markdown]
# ## How much should the host hold?
#
# A step's time against the host pool's share of the tokens (APP's balance): in the paper's form each side sends as
# soon as it has scored; with a barrier, selection needs both results.

# %%
import numpy as np

from hillinfer.systems.hillinfer.balance import SelectionRates

qwen, tokens, shares = find_shape("qwen-7b"), 12288, np.linspace(0.02, 1, 50)
code, record = qwen.code_bytes(), qwen.record_bytes
speeds, rates = card.speeds(record), SelectionRates(alpha, alpha)
host, cold = code / speeds.fc + alpha * record / speeds.bc, code / speeds.fs + alpha * record / speeds.bs
forms = {
    "paper": np.maximum(shares * host, (1 - shares) * cold),
    "barrier": np.array([speeds.step_seconds(share, rates, code, record) for share in shares]),
}
figure = go.Figure()
for (form, seconds), colour in zip(forms.items(), (COLOURS["compute"], COLOURS["drive read"]), strict=True):
    figure.add_scatter(x=shares, y=1e3 * tokens * seconds, name=form, line_color=colour)
predicted = cold / (host + cold)
note = f"the paper's closed form: {predicted:.0%}"
figure.add_vline(x=predicted, line_dash="dot", annotation_text=note, annotation_position="bottom left")
figure.update_layout(LAYOUT, title="qwen-7b, 12K tokens: one layer's scoring and sending, modelled")
figure.update_xaxes(title="share of the tokens in the host's pool", tickformat=".0%")
figure.update_yaxes(title="ms (modelled)", rangemode="tozero")

# %% [markdown]
# ## The pipeline over an emulated card
#
# The drive is emulated on this machine: real files, real codes, exact scores in blocks, paced to a SmartSSD's rates.
# It uses CPU time that a real drive would not.

# %%
from transformers import logging

from hillinfer.assets import load_embedded, machine
from hillinfer.workbench import Case, LiveRun, show_timeline

logging.disable_progress_bar()
model, tokenizer = load_embedded()
case, runs = Case.task(tokenizer, task, length, seed), {}
for precision in ("int8", "int4"):
    options = dict(alpha=alpha, drive=drive, drive_kind="emulated", paced=True, precision=precision)
    runs[precision] = LiveRun(model, tokenizer, case, "hillinfer", options)
    runs[precision].start().result()
print("emulated drive; measured on", machine())
rows = []
for precision, run in runs.items():
    busy, nbytes = run.figures["lanes"]["drive"]
    row = {"key codes": precision, "answer": run.answer, "right": run.right}
    row |= {"ms per token": run.figures["ms_per_token"], "drive busy, ms per token": busy}
    rows.append(row | {"from the drive, KiB per token": nbytes / 1024, "overlap": run.figures["overlap"]})
table = pd.DataFrame(rows).set_index("key codes")
table.style.format("{:,.1f}", subset=list(table)[2:5]).format("{:.0%}", subset=["overlap"])

# %%
show_timeline(runs["int8"].timeline)

# %% [markdown]
# ## With your own model, and with a card
#
# Replace the line that loads the model. With a real SmartSSD the drive kind is `xrt` and `xclbin` names the kernel
# that `make -C fpga link` built: that path is written and tested over the simulated kernel, and never ran on a card
# (`fpga/README.md`). `make -C fpga table` measures the configurations again.
