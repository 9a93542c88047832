"""What the model's attention is like, and how accuracy falls when decode steps may attend to few tokens only.

`python data/attention.py` prints, for data/model, (1) exact match when the question and answer tokens attend, in each
head, to the true top of their keys, to a recent window with and without the first tokens, or to as many random keys;
(2) for each layer and head how concentrated its attention is. Context tokens always attend to all before them.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from evaluate import interval  # noqa: E402
from make_tasks import SEED  # noqa: E402

import hillinfer.longbench.synthetic as syn  # noqa: E402

SINKS = 4  # how many first tokens count as sink


@dataclass
class Restriction:
    """Which keys the rows from `start` on may use: a policy and a share of the context."""

    policy: str = "full"
    share: float = 1.0
    start: int = 0
    look: bool = False
    seen: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # layer -> per document (statistics, heads)

    def keep(self, scores: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
        """Kept keys (H, r, n), out of masked scores (H, r, n) and the causal mask (r, n)."""
        heads, rows, n = scores.shape
        budget = max(1, round(self.share * self.start))
        if self.policy == "full":
            return causal.expand(heads, rows, n)
        if self.policy == "top":
            return (scores >= scores.topk(budget, -1).values[..., -1:]) & causal
        age = torch.arange(self.start, self.start + rows)[:, None] - torch.arange(n)
        if self.policy == "window":
            return ((age < budget) & causal).expand(heads, rows, n)
        if self.policy == "window+sinks":
            return (((age < budget - SINKS) | (torch.arange(n) < SINKS)) & causal).expand(heads, rows, n)
        chance = torch.rand(scores.shape).masked_fill(~causal, -1.0)  # random
        chance[:, age == 0] = 2.0
        return (chance >= chance.topk(budget, -1).values[..., -1:]) & causal

    def attend(self, module, query, key, value, mask, scaling=None, **_):
        """An attention function for transformers: (B=1, H, n, D) in, (B, n, H, D) out."""
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        s, n = self.start, key.shape[2]
        head = F.scaled_dot_product_attention(
            *(x[:, :, :s] for x in (query, key, value)), is_causal=True, scale=scaling
        )
        causal = torch.arange(s, n)[:, None] >= torch.arange(n)
        scores = (query[0, :, s:] @ key[0].transpose(1, 2) * scaling).masked_fill(~causal, -torch.inf)
        weights = scores.masked_fill(~self.keep(scores, causal), -torch.inf).softmax(-1)
        if self.look:
            self.seen.setdefault(module.layer_idx, []).append(statistics(weights, s))
        return torch.cat((head, (weights @ value[0])[None]), 2).transpose(1, 2).contiguous(), None


def statistics(weights: torch.Tensor, start: int) -> torch.Tensor:
    """(4, H): share of keys for 95 % of the mass, mass on the first tokens, on the last 16, top-10 % overlap."""
    rows, n = weights.shape[1:]
    mass = weights.sort(-1, descending=True).values.cumsum(-1)
    needed = ((mass < 0.95).sum(-1) + 1).float() / n
    top = torch.zeros_like(weights).scatter(2, weights.topk(start // 10, -1).indices, 1.0)
    overlap = (top[:, 1:] * top[:, :-1]).sum(-1) / (start // 10)
    age = torch.arange(start, start + rows)[:, None] - torch.arange(n)
    recent = (weights * ((age >= 0) & (age < 16))).sum(-1)
    return torch.stack([x.mean(-1) for x in (needed, weights[..., :SINKS].sum(-1), recent, overlap)])


@torch.inference_mode()
def accuracy(model, tokenizer, records: list[dict], restriction: Restriction) -> float:
    """Exact match with each answer step restricted; given one right answer token, the next must be right too."""
    right = 0
    for record in records:
        prompt = syn.prompt_of(record)
        split = prompt.index(record["context"]) + len(record["context"])
        ids = tokenizer(prompt[:split]).input_ids
        restriction.start = len(ids)
        ids = ids + tokenizer(prompt[split:], add_special_tokens=False).input_ids
        wanted = [*tokenizer(record["answers"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        logits = model(torch.tensor([ids + wanted[:-1]]), logits_to_keep=len(wanted), use_cache=False).logits[0]
        right += logits.argmax(-1).tolist() == wanted
    return right / len(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=ROOT / "data" / "model", type=Path)
    parser.add_argument("--tasks", nargs="*", default=["lines", "majority", "chain"])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    restriction = Restriction()
    AttentionInterface.register("restricted", restriction.attend)
    AttentionMaskInterface.register("restricted", lambda *_, **__: None)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kind = {"dtype": torch.float32, "attn_implementation": "restricted"}
    model = AutoModelForCausalLM.from_pretrained(args.model, **kind).eval()
    settings = [("full", 1.0), *(("top", s) for s in (0.2, 0.1, 0.05, 0.02, 0.01))]
    settings += [(policy, s) for s in (0.1, 0.2) for policy in ("window", "window+sinks", "random")]
    found = {"accuracy": [], "heads": []}
    for task in args.tasks:
        records = syn.make_records(task, args.length, args.n, SEED)
        for restriction.policy, restriction.share in settings:
            restriction.look = restriction.policy == "full"
            score = accuracy(model, tokenizer, records, restriction)
            low, high = interval(round(score * args.n), args.n)
            found["accuracy"].append([task, restriction.policy, restriction.share, score])
            name = f"{task:9} {restriction.policy:12} {restriction.share:.0%}"
            print(f"{name}  {score:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    print("layer head: keys for 95 % of the mass, on the first 4, on the last 16, top-10 % overlap step to step")
    for layer, kept in sorted(restriction.seen.items()):
        for head, values in enumerate(torch.stack(kept).mean(0).T.tolist()):
            found["heads"].append([layer, head, *values])
            print(f"{layer} {head}: " + "  ".join(f"{v:.3f}" for v in values))
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
