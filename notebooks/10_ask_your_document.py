# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ask your document
#
# **What you will see:** a file is prefilled once and asked twice. The second question opens the document's KV from a
# store instead of computing it, and says what came from there. Then a small budget is compared with full attention:
# whether the answer is the same, from which token on it is not, and what each token cost.
#
# Without a file of yours it writes a register of a hundred lines, which the bundled model can read; it knows no other
# English. A file of yours needs a real model, in the same two fields.

# %% tags=["parameters"]
model = "embedded"  # or a folder, a hub id or a .gguf file
store = None  # a folder that keeps the KV of all prompts, also when this kernel has ended; None forgets it then
file = None  # your .txt, .md or .pdf; None writes the register
questions = ["What is the main result?", "How was it measured?"]  # asked of your file
alpha = 0.2  # share of the tokens that a decode step attends to
new_tokens = 8  # of an answer; 64 for your own

# %%
import re
import tempfile
from pathlib import Path

temporary = tempfile.TemporaryDirectory()  # goes when the kernel ends
place = Path(temporary.name)
if file is None:
    from hillinfer.longbench.synthetic import PROMPTS, QUESTION, make_records

    head, tail = PROMPTS["lines"].split("{context}")
    register = make_records("lines", 1500, 1, seed=6)[0]["context"]
    file = place / "register.md"
    file.write_text(head + register, encoding="utf-8")
    lines = re.findall(r"line (\S+): REGISTER_CONTENT is <(\d+)>", register)
    wanted = [lines[len(lines) // 3], lines[-20]]
    questions = [tail.format(input=QUESTION["lines"].format(key)).strip("\n") for key, _ in wanted]
    print("the register says:", ", ".join(f"{key} {number}" for key, number in wanted))

# %% [markdown]
# ## One document, two questions
#
# *prompt* is *own text or file*. With a prefix store the first run keeps the document's KV, in blocks of 256 tokens.
# Later runs open what their prompt has in common with any earlier one, also after a restart of the kernel, and prefill
# the rest.

# %%
from hillinfer.workbench import Workbench
from hillinfer.workbench.cases import TEXT

workbench = Workbench(drive=place)
if model != "embedded":
    workbench.chosen.load(model)
workbench.origin.value, workbench.file.value = TEXT, str(file)
workbench.new_tokens.value, workbench.alpha.value = new_tokens, alpha
workbench.store.value = str(store or place / "kv")
workbench.show()

# %%
import time

for question in questions:
    workbench.question.value, began = question, time.perf_counter()
    answer = workbench.run()
    print(f"{question[-70:]}\n    {answer}\n    {time.perf_counter() - began:.1f} s in all")
    print(f"    {workbench.runs[-1].opened}")

# %% [markdown]
# ## Is it the full cache's answer?
#
# The same question with all KV in memory, beside the last run. Where answers part, the budget was too small for this
# document: raise `alpha`, or decode exactly.

# %%
from hillinfer.workbench.differences import first_difference

workbench.system.value = "full"
workbench.run(beside=True)
small, full = workbench.runs
print(first_difference(small, full))
for one in (small, full):
    attended, read = one.figures["attended"], one.figures["drive_bytes_per_token"]
    print(f"{one.system:10} {one.answer[:60]!r}: {attended:,.0f} tokens attended to, {read:,.0f} bytes a token")

# %% [markdown]
# ## Where did the time go?

# %%
import hillinfer

print(hillinfer.explain(small))

# %% [markdown]
# ## With your own document
#
# Set `model` to a real one (`Qwen/Qwen2.5-0.5B-Instruct`, a folder or a `.gguf` file), `file` to your `.pdf` (with
# `pip install 'hillinfer[pdf]'`), `.md` or `.txt`, and `questions`. A model with a chat template is asked in its own
# form. The document must fit into the model's window; a run that would not is refused before it starts.
