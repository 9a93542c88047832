"""Attention statistics of the model, and its accuracy when decode steps attend to few tokens.

`python data/attention.py` prints, for data/model,
(1) exact match when question and answer tokens attend, per head, to the true top keys, to a recent window with or
    without the first tokens, or to equally many random keys. Context tokens use full causal attention;
(2) the same for windows that include the queried fact, where only the first tokens can make a difference;
(3) the concentration of attention by layer and head.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from evaluate import interval, split  # noqa: E402
from make_tasks import SEED  # noqa: E402

import hillinfer.longbench.synthetic as syn  # noqa: E402

SINKS = 4  # number of first tokens that count as sinks
TOPS = [("top", share) for share in (0.2, 0.1, 0.05, 0.02, 0.01)]
OTHERS = [(policy, share) for share in (0.1, 0.2) for policy in ("window", "window+sinks", "random")]


@dataclass
class Restriction:
    """The keys that a pass over a cached context may attend to: a policy and a share of the context."""

    policy: str = "full"
    share: float = 1.0
    look: bool = False
    seen: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # layer -> per document (statistics, heads)

    def keep(self, scores: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
        """Kept keys (H, r, n), out of masked scores (H, r, n) and the causal mask (r, n)."""
        heads, rows, n = scores.shape
        start = n - rows
        budget = max(1, round(self.share * start))
        if self.policy == "full":
            return causal.expand(heads, rows, n)
        if self.policy == "top":
            return (scores >= scores.topk(budget, -1).values[..., -1:]) & causal
        age = torch.arange(start, n)[:, None] - torch.arange(n)
        if self.policy == "window":
            return ((age < budget) & causal).expand(heads, rows, n)
        if self.policy == "window+sinks":
            return (((age < budget - SINKS) | (torch.arange(n) < SINKS)) & causal).expand(heads, rows, n)
        chance = torch.rand(scores.shape).masked_fill(~causal, -1.0)  # random
        chance[:, age == 0] = 2.0
        return (chance >= chance.topk(budget, -1).values[..., -1:]) & causal

    def attend(self, module, query, key, value, mask, scaling=None, **_):
        """Attention function for transformers: (B=1, H, r, D) and (B=1, Hkv, n, D) -> (B, r, H, D).

        The prefill (r = n) is not restricted.
        """
        repeat, rows, n = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        if rows == n:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
            return out.transpose(1, 2).contiguous(), None
        causal = torch.arange(n - rows, n)[:, None] >= torch.arange(n)
        scores = (query[0] @ key[0].transpose(1, 2) * scaling).masked_fill(~causal, -torch.inf)
        weights = scores.masked_fill(~self.keep(scores, causal), -torch.inf).softmax(-1)
        out = weights @ value[0]  # (H, r, D)
        if self.look:
            to_stream = module.o_proj.weight.view(-1, *out.shape[::2])  # (d, H, D)
            written = torch.einsum("hrd,ehd->hre", out, to_stream).norm(dim=-1).mean(-1)
            found = torch.cat((statistics(weights), (written / written.sum())[None]))
            self.seen.setdefault(module.layer_idx, []).append(found)
        return out[None].transpose(1, 2).contiguous(), None


def statistics(weights: torch.Tensor) -> torch.Tensor:
    """(4, H): share of keys for 95 % of the mass, mass on the first tokens, on the last 16, top-10 % overlap."""
    rows, n = weights.shape[1:]
    start = n - rows
    mass = weights.sort(-1, descending=True).values.cumsum(-1)
    needed = ((mass < 0.95).sum(-1) + 1).float() / n
    top = torch.zeros_like(weights).scatter(2, weights.topk(start // 10, -1).indices, 1.0)
    overlap = (top[:, 1:] * top[:, :-1]).sum(-1) / (start // 10)
    age = torch.arange(start, n)[:, None] - torch.arange(n)
    recent = (weights * ((age >= 0) & (age < 16))).sum(-1)
    return torch.stack([x.mean(-1) for x in (needed, weights[..., :SINKS].sum(-1), recent, overlap)])


def load(folder: Path, restriction: Restriction):
    """The model, with its attention limited by `restriction`, and its tokenizer."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

    AttentionInterface.register("restricted", restriction.attend)
    AttentionMaskInterface.register("restricted", lambda *_, **__: None)
    kind = {"dtype": torch.float32, "attn_implementation": "restricted"}
    return AutoModelForCausalLM.from_pretrained(folder, **kind).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def answers(model, tokenizer, restriction: Restriction, record: dict, settings: list) -> Iterator[tuple[bool, float]]:
    """Teacher-forced answers by setting: correctness of each token's argmax, and their mean NLL in nats.

    The context is prefilled once."""
    context, question = split(syn.prompt_of(record), record["context"])
    ids = tokenizer(question, add_special_tokens=False).input_ids
    wanted = [*tokenizer(record["answers"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    look, restriction.look = restriction.look, False
    out = model(torch.tensor([tokenizer(context).input_ids]), logits_to_keep=1, use_cache=True)
    cache = out.past_key_values
    start = cache.get_seq_length()
    for restriction.policy, restriction.share in settings:
        restriction.look = look and restriction.policy == "full"
        step = torch.tensor([ids + wanted[:-1]])
        logits = model(step, past_key_values=cache, logits_to_keep=len(wanted), use_cache=True).logits[0]
        cache.crop(start - cache.get_seq_length())
        losses = F.cross_entropy(logits, torch.tensor(wanted))
        yield logits.argmax(-1).tolist() == wanted, losses.item()
    restriction.look = look


def paired(values: torch.Tensor) -> tuple[float, float, float]:
    """Mean of paired differences, and its 95 % bootstrap interval over documents."""
    drawn = values[torch.randint(len(values), (2000, len(values)))].mean(1)
    return values.mean().item(), *drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()


def compare(model, tokenizer, restriction: Restriction, task: str, length: int, n: int, share: float = 0.2) -> dict:
    """A window against one of equal size with the first tokens, on `n` documents whose window includes the fact."""
    settings = [("window", share), ("window+sinks", share)]
    records = islice(syn.in_window(task, length, share, SEED), n)
    rows = [list(answers(model, tokenizer, restriction, record, settings)) for record in records]
    right = torch.tensor([[a[0] for a in row] for row in rows]).double().mean(0).tolist()
    loss = torch.tensor([[a[1] for a in row] for row in rows], dtype=torch.double)
    found = {"task": task, "n": n, "exact": right, "loss": loss.mean(0).tolist()}
    return found | {"difference": paired(loss[:, 0] - loss[:, 1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "data" / "model", type=Path)
    parser.add_argument("--tasks", nargs="*", default=list(syn.TASKS))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    restriction = Restriction(look=True)
    model, tokenizer = load(args.model, restriction)
    settings = [("full", 1.0), *TOPS, *OTHERS]
    found = {"length": args.length, "accuracy": [], "first tokens": [], "heads": []}
    for task in args.tasks:
        records = syn.make_records(task, args.length, args.n, SEED)
        rows = [[right for right, _ in answers(model, tokenizer, restriction, r, settings)] for r in records]
        for (policy, share), right in zip(settings, map(sum, zip(*rows, strict=True)), strict=True):
            low, high = interval(right, args.n)
            found["accuracy"].append([task, policy, share, args.n, right / args.n])
            print(f"{task:9} {policy:12} {share:.0%}  {right / args.n:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    print("layer head: keys for 95 % of the mass, on the first 4, on the last 16, top-10 % overlap step to step, "
          "share of what the layer's heads write")  # fmt: skip
    for layer, kept in sorted(restriction.seen.items()):
        for head, values in enumerate(torch.stack(kept).mean(0).T.tolist()):
            found["heads"].append([layer, head, *values])
            print(f"{layer} {head}: " + "  ".join(f"{v:.3f}" for v in values))
    restriction.look = False
    for task in [task for task in args.tasks if task not in ("two_hop", "chain")]:  # one fact per answer
        row = compare(model, tokenizer, restriction, task, args.length, args.n)
        found["first tokens"].append(row)
        print("{task:9} 20% window that holds the fact, without and with the first tokens: exact match {exact}, "
              "loss of the answer {loss}, difference {difference}".format(**row), flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
