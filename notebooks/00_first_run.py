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
# cache is spread over host memory and a drive. As tokens come you see what each attention head looks at, which
# tier served it, and what the processor and the drive did at each moment. Then the same question runs a second
# way, and both stand side by side.
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
# Press **Run**. **Stop** ends a run after the token under way, and so does the kernel's interrupt button.
# **Compare** runs the present settings beside the last run: choose another system first. Click a token, a step, a
# head or a moment, and it is marked in every view.

# %%
from hillinfer.workbench import Workbench

workbench = Workbench()
workbench.task.value, workbench.tokens.value = task, tokens
workbench.alpha.value, workbench.seed.value = alpha, seed
workbench.show()

# %% [markdown]
# ## The same without clicking
#
# Every control is a Python object with a `value`, and `run` waits for the answer. This is how the notebook is
# tested.

# %%
workbench.system.value = "hillinfer"
print("answer:", workbench.run())
print("right: ", workbench.runs[-1].right)

# %% [markdown]
# Now beside it the reference that keeps all KV in memory and attends to every token. At this size it is faster,
# because it needs no drive; look at the bytes in memory.

# %%
workbench.system.value = "full"
print("answer:", workbench.run(beside=True))

# %%
from hillinfer.workbench.differences import compare_figures

first, second = workbench.runs
for name, one, other, form in compare_figures(first, second):
    print(f"{name:40} {one:{form}}".ljust(56), f"{other:{form}}".rjust(12))

# %% [markdown]
# ## With your own model
#
# Any decoder-only model of the Llama, Qwen, Mistral or OPT families, from a folder or the hub:
#
# ```python
# from transformers import AutoModelForCausalLM, AutoTokenizer
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
# tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
# Workbench(model, tokenizer, drive="/mnt/nvme").show()
# ```
#
# Choose *own text* as the task and paste a document, or keep the synthetic tasks. A long document is read once if its
# KV is kept: `workbench.session.value = "report.kv"`, made by the first run and opened by all later ones.
#
# Next: `01_attention_sparsity`.
