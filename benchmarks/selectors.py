"""Rules of selection on a real model's exact logits, against what the package does with coded keys:

    python -m benchmarks.selectors MODEL --rows FOLDER --tasks multi_news,qmsum --n 2 --alpha 0.1,0.05

Every rule is a policy of a few lines, and all are teacher-forced on the reference answer in one decode, after an exact
prefill of document and question. KL is of the full cache's next-token distribution to the rule's, in nats. A rule that
earns its place gets a kernel; this is where to try it first.
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hillinfer import Policy, Settings
from hillinfer.assets import machine
from hillinfer.cache import TieredCache
from hillinfer.loading import load_model
from hillinfer.longbench.fidelity import force, reference_ids
from hillinfer.longbench.job import prompt_of
from hillinfer.longbench.prefilled import Prefilled
from hillinfer.longbench.runner import feed
from hillinfer.longbench.sources import load_all
from hillinfer.systems.registry import POLICIES, list_systems

CHUNK = 2048


class Exact(Policy):
    """The device window, and the tokens with the highest `rank` by exact logits (Hkv, G, n)."""

    needs_codes = False
    per_head = True
    keys = None

    def append(self, keys: torch.Tensor) -> None:
        keys = keys.float()
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), 2)

    def select(self, step):
        if step.budget >= step.n:
            return None
        keys, first, last = self.keys[step.row], step.sinks, step.n - step.recent
        logits = torch.einsum("hgd,hnd->hgn", step.grouped(len(keys)) * step.scaling, keys)
        chosen = first + self.rank(logits)[first:last].topk(step.budget - first - step.recent).indices.numpy()
        return np.concatenate((np.arange(first), np.sort(chosen), np.arange(last, step.n)))


class LogProbability(Exact):
    """The highest log-probability of any query head: the package's rule, on exact keys."""

    def rank(self, logits):
        return (logits - logits.logsumexp(2, keepdim=True)).amax((0, 1))


class Mass(Exact):
    """The sum of all heads' softmax."""

    def rank(self, logits):
        return logits.softmax(2).sum((0, 1))


class Squares(Exact):
    """The sum of the squares of all heads' softmax: between the highest and the sum."""

    def rank(self, logits):
        return logits.softmax(2).square().sum((0, 1))


class GroupBest(Exact):
    """The best logit of a group, normalised by group: what a scan that keeps a group's maximum allows."""

    def rank(self, logits):
        best = logits.amax(1)
        return (best - best.logsumexp(1, keepdim=True)).amax(0)


class Turns(Exact):
    """KV heads take turns: a token ranks by the first turn at which some head takes it."""

    def rank(self, logits):
        turn = logits.amax(1).argsort(1, descending=True).argsort(1)
        return -(turn * len(turn) + torch.arange(len(turn), device="cpu")[:, None]).amin(0)


CODED = "coded keys (topk)"
EXACT = {"log-probability": LogProbability, "mass": Mass, "squares": Squares, "group's best": GroupBest, "turns": Turns}
RULES = {CODED: POLICIES["topk"]} | EXACT | {"highest weight (oracle)": POLICIES["oracle"]}
PRECISIONS = {f"{CODED}, {name}": name for name in ("int4", "int2")}
RULES |= dict.fromkeys(PRECISIONS, POLICIES["topk"])
OTHERS = ("leoam", "leoam-released", "quest", "quest-dense", "infinigen", "h2o", "snapkv")
RULES |= {name: list_systems()[name].policy for name in OTHERS}
APART = [CODED, "log-probability", "mass", "highest weight (oracle)", *OTHERS[2:]]  # also each KV head for itself
ALL = [(rule, False) for rule in RULES if not RULES[rule].watches]  # what watches the prefill is of one kind
ALL += [(rule, True) for rule in APART]


def measure(
    model, tokenizer, task, record: dict, alphas: list[float], tokens: int, kinds=ALL, stepwise=False, own=False
) -> list[dict]:
    """A row for each rule and alpha on one record.

    kinds     rules, and whether each KV head selects for itself
    stepwise  the question goes through the rules as well; otherwise it is prefilled exactly
    own       the answer is the full cache's own greedy one; otherwise the reference
    """
    prompt = prompt_of(task, record, model.config, tokenizer, tokens)
    ids, exact = prompt.ids, prompt.document if stepwise else len(prompt.ids) - 1
    ways = [("full", 1.0, False), *((rule, alpha, apart) for alpha in alphas for rule, apart in kinds)]
    with torch.inference_mode(), ExitStack() as stack:
        source = Prefilled(model.config, {RULES[rule] for rule, _ in kinds if RULES[rule].watches})
        feed(model, source, ids[:exact], CHUNK)
        caches = []
        for rule, alpha, apart in ways:
            policy = RULES.get(rule, POLICIES["full"])
            options = dict(alpha=alpha, per_head=apart, precision=PRECISIONS.get(rule, "int8"))
            cache = TieredCache(model.config, policy, Settings(**options))
            caches.append(stack.enter_context(cache))
            source.fill(caches[-1], model.device)
        gold = None if own else reference_ids(tokenizer, task, prompt, record["answers"])
        found = force(model, caches, ids[exact:], gold)
    common = {"task": task.name, "id": record["_id"], "prompt": len(ids)}
    common |= {"question": "stepwise" if stepwise else "exact", "answer": "own" if own else "reference"}
    return [
        common | {"rule": f"{rule}, per KV head" if apart else rule, "alpha": alpha, "tokens": len(each.kl)}
        | {"kl": np.mean(each.kl), "agree": np.mean(each.agree), "mass": each.mass}
        for (rule, alpha, apart), each in zip(ways, found, strict=True)
    ]  # fmt: skip


def table_of(rows: list[dict]) -> pd.DataFrame:
    """Means over answer tokens, by setting, alpha and rule."""
    frame = pd.DataFrame(rows)
    for name in ("kl", "agree", "mass"):
        frame[name] *= frame.tokens
    keys = ["question", "answer", "alpha", "rule"]
    sums = frame.groupby(keys, sort=False)[["tokens", "kl", "agree", "mass"]].sum()
    return sums[["kl", "agree", "mass"]].div(sums.tokens, axis=0).assign(tokens=sums.tokens).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--rows", type=Path, required=True, help="folder of LongBench rows")
    parser.add_argument("--tasks", default="multi_news,qmsum,gov_report,repobench-p")
    parser.add_argument("--n", type=int, default=1, help="rows of each task, shortest first")
    parser.add_argument("--tokens", type=int, default=7500, help="longest prompt")
    parser.add_argument("--alpha", default="0.1,0.05")
    parser.add_argument("--rules", default="", help="words in the names of the rules to try: `int2,mass`; all without")
    parser.add_argument("--stepwise", action="store_true", help="the question goes through the rules as well")
    parser.add_argument("--own", action="store_true", help="the full cache's own answers, not the references")
    parser.add_argument("--out", type=Path, default=Path("out/selectors.jsonl"))
    words = parser.parse_args()
    alphas, rows = [float(alpha) for alpha in words.alpha.split(",")], []
    kinds = [kind for kind in ALL if any(word in kind[0] for word in words.rules.split(","))]
    model, tokenizer = load_model(words.model)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    for task, records, _ in load_all(words.tasks.split(","), [words.rows], "main"):
        for record in sorted(records, key=lambda record: len(record["context"]))[: words.n]:
            rows += measure(model, tokenizer, task, record, alphas, words.tokens, kinds, words.stepwise, words.own)
            words.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"{task.name}, {rows[-1]['prompt']:,} tokens", flush=True)
    print(table_of(rows).to_string(index=False, float_format="%.4f"))
    print(f"{words.model} in {model.dtype}; {machine()}; {words.out}")


if __name__ == "__main__":
    main()
