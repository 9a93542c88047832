# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exact: few tokens draft, all verify
#
# **What you will see:** a selection that drafts tokens and one pass over all KV that checks them, so that the answer is
# the full cache's at any budget; how many drafted tokens are accepted, and how many tokens a pass gives, by alpha; the
# drafts and passes on the timeline; and what it costs, also where it does not pay.

# %% tags=["parameters"]
model = "embedded"  # or a folder, a hub id or a .gguf file
text = None  # yours to continue; None writes a register of a hundred lines
alphas = [0.02, 0.05, 0.1, 0.2]  # shares of the tokens that a draft attends to
new_tokens = 48
drive = None  # a folder on the drive; None takes a temporary one

# %%
import tempfile
import warnings

from transformers import logging

from hillinfer import load_model
from hillinfer.assets import load_embedded, machine
from hillinfer.longbench.synthetic import PROMPTS, make_records
from hillinfer.workbench import Case, LiveRun

logging.disable_progress_bar()
warnings.filterwarnings("ignore", ".*does not pay here")  # said once a run; the rounds below show it
temporary = tempfile.TemporaryDirectory()  # goes when the kernel ends
drive = drive or temporary.name
loaded, tokenizer = load_embedded() if model == "embedded" else load_model(model)
if text is None:
    register = make_records("lines", 1500, 1, seed=6)[0]["context"]
    text = PROMPTS["lines"].split("{context}")[0] + register[:-700]  # ends in the middle of a word
case = Case.text(tokenizer, text, "", new_tokens)


def run(system, exact=False, **options):
    one = LiveRun(loaded, tokenizer, case, system, options, exact=exact)
    one.start().result()
    return one


full = run("full")
sparse = {alpha: run("hillinfer", alpha=alpha, drive=drive) for alpha in alphas}
exact = {alpha: run("hillinfer", exact=True, alpha=alpha, drive=drive) for alpha in alphas}
print(f"{len(case.context) + len(case.question):,} tokens of text, {new_tokens} new ones; measured on {machine()}")

# %% [markdown]
# ## The same tokens
#
# Each column continues the same text. A selection alone parts from `full` somewhere, or by luck nowhere; verified, it
# must not. (Two logits within rounding of each other can fall either way, as between any two implementations.)

# %%
import pandas as pd

from hillinfer.workbench.differences import first_difference


def against_full(one):
    return first_difference(full, one).removeprefix("the answers ")


def shown(one):
    return f"{one.answer}\n({against_full(one)})"


rows = [(f"{alpha:.0%}", full.answer, shown(sparse[alpha]), shown(exact[alpha])) for alpha in alphas]
table = pd.DataFrame(rows, columns=["alpha", "full", "hillinfer alone", "hillinfer drafts, all KV verifies"])
table.style.hide().set_properties(**{"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top"})

# %%
assert {against_full(one) for one in exact.values()} == {"are identical, token for token"}

# %% [markdown]
# ## Acceptance, and tokens a pass
#
# A round drafts some tokens and verifies them in one pass over all KV. It keeps the drafted tokens up to the first
# wrong one, and the pass itself gives one more. A draft ends where the model is unsure of its tokens. How unsure
# follows from the acceptance and the measured times of both parts, so on a busy machine the same alpha can give other
# lengths.

# %%
from plotly.subplots import make_subplots

from hillinfer.workbench.palette import LINES

rounds = {alpha: one.counters.rounds for alpha, one in exact.items()}
drafted = {alpha: sum(n for n, _ in found) for alpha, found in rounds.items()}
accepted = {alpha: sum(n for _, n in found) for alpha, found in rounds.items()}
names = [f"{alpha:.0%}" for alpha in alphas]
figure = make_subplots(1, 2, subplot_titles=["drafted tokens that are accepted", "tokens from a pass over all KV"])
shares = [accepted[alpha] / max(1, drafted[alpha]) for alpha in alphas]
passes = [1 + accepted[alpha] / max(1, len(rounds[alpha])) for alpha in alphas]
figure.add_bar(x=names, y=shares, text=[f"{share:.0%}" for share in shares], marker_color=LINES[0], col=1, row=1)
figure.add_bar(x=names, y=passes, text=[f"{n:.1f}" for n in passes], marker_color=LINES[1], col=2, row=1)
figure.update_yaxes(tickformat=".0%", range=[0, 1.1], col=1)
figure.update_yaxes(range=[0, 1.15 * max(passes)], col=2)
figure.update_xaxes(title="alpha of the drafts")
for alpha, found in rounds.items():
    print(f"alpha {alpha:.0%}: {len(found)} passes, {sum(n == 0 for n, _ in found)} of them without a draft")
figure.update_layout(template="plotly_white", showlegend=False, height=340, margin=dict(l=50, r=20, t=50, b=50))

# %% [markdown]
# ## Drafts and passes on the timeline
#
# Each round has a span `draft` and a span `verify`, in which the spans of their steps lie: a draft has a step for each
# token, which selects and reads little; the pass reads everything that is only on the drive, once.

# %%
from hillinfer.workbench import show_timeline

best = alphas[passes.index(max(passes))]
show_timeline(exact[best].timeline)

# %% [markdown]
# ## What it costs
#
# `full` keeps all KV in memory, `flexgen` streams it from the drive for every token, and both give the same tokens as
# the last row. Bytes are counted, times are measured.

# %%
from hillinfer.longbench.runner import in_memory

streamed = run("flexgen", drive=drive)
ways = {"full, in memory": full, "flexgen, streamed": streamed}
ways |= {f"hillinfer {best:.0%}, alone": sparse[best], f"hillinfer {best:.0%}, exact": exact[best]}
rows = []
for name, one in ways.items():
    mib = one.figures["drive_bytes_per_token"] / 2**20, in_memory(one.figures["memory"]) / 2**20
    costs = one.figures["ms_per_token"], *mib
    rows.append((name, *costs, against_full(one)))
columns = ["decoding", "ms per token", "MiB from the drive per token", "MiB in memory", "against full"]
pd.DataFrame(rows, columns=columns).style.hide().format(precision=1)

# %% [markdown]
# **Where it does not pay.** Where all KV fits in memory, `full` gives these tokens without drafts, and here it is
# faster: a model as small as this one spends its time on Python and not on KV, and a draft costs as much as a token.
# Drafts that are rarely accepted, or a drive that reads a whole pass as fast as the model computes, do not pay either:
# most tokens are then read for one by one, and a warning says so (the passes without a draft above). It pays where a
# pass over all KV takes several times as long as a drafted token: long texts, large models, slow drives.
#
# **Where it cannot be used.** Batches, systems that learn from what they see (`h2o`, `snapkv`, `infinigen`), and models
# with sliding windows or states, which cannot take tokens back, are refused by name.
#
# ## With your own model
#
# Set `model` and `text`. In your own code it is one argument of `generate`:
#
#     model.generate(**inputs, past_key_values=cache, custom_generate=hillinfer.exact)
#
# and in the terminal `hillinfer run --exact`. `docs/how-to/decode-exactly.md` says the rest.
