"""Exact match of a model on held-out records and real LongEval cases, with 95 % intervals and the partial-key floor.

`python data/evaluate.py --n 200` measures data/model and prints one line for each task and length. data/make_tasks.py
writes the first of the same records to data/tasks/; any number of them can be asked for.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from make_tasks import SEED  # noqa: E402

import hillinfer.longbench.synthetic as syn  # noqa: E402


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval."""
    z, p = 1.96, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def greedy(model, ids: list[int], steps: int, end: int) -> list[int]:
    """Plain greedy decoding of at most `steps` tokens, with transformers' own cache."""
    out = model(torch.tensor([ids]), logits_to_keep=1, use_cache=True)
    given = [out.logits[0, -1].argmax().item()]
    while given[-1] != end and len(given) < steps:
        out = model(torch.tensor([given[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        given.append(out.logits[0, -1].argmax().item())
    return given


@torch.inference_mode()
def answered(model, tokenizer, prompt: str, answer: str) -> tuple[float, list[int], int]:
    """The share of answer tokens (the end included) that greedy decoding gets right; its tokens; the prompt's length.

    One pass over prompt and answer tells whether greedy decoding is right throughout: it is when each answer token is
    the most likely one. Only where it is not, the answer is decoded step by step.
    """
    ids = tokenizer(prompt).input_ids
    wanted = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    logits = model(torch.tensor([ids + wanted[:-1]]), logits_to_keep=len(wanted), use_cache=False).logits[0]
    given = logits.argmax(-1).tolist()
    if given != wanted:
        given = greedy(model, ids, len(wanted), tokenizer.eos_token_id)
    same = sum(a == b for a, b in zip(given, wanted, strict=False))
    return same / len(wanted), given, len(ids)


def measure(model, tokenizer, name: str, cases: list[tuple[str, str]], floor: float | None, show: int = 0) -> dict:
    right, tokens, longest, began = 0, 0.0, 0, time.perf_counter()
    for prompt, answer in cases:
        share, given, length = answered(model, tokenizer, prompt, answer)
        right, tokens, longest = right + (share == 1), tokens + share, max(longest, length)
        if share < 1 and show > 0:
            show -= 1
            print(f"  asked {prompt[-70:]!r} wanted {answer!r} got {tokenizer.decode(given)!r}")
    low, high = interval(right, len(cases))
    row = {
        "name": name, "n": len(cases), "exact": right / len(cases), "low": low, "high": high,
        "tokens_right": tokens / len(cases), "floor": floor, "longest": longest,
    }  # fmt: skip
    note = "no shared key parts" if floor is None else f"floor {floor:.3f}"
    print(f"{name:14} n {row['n']:4}  exact match {row['exact']:.3f} [{low:.3f}, {high:.3f}]  {note}  tokens right "
          f"{row['tokens_right']:.3f}  longest prompt {longest}  {time.perf_counter() - began:.0f} s",
          flush=True)  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=ROOT / "data" / "model", type=Path)
    parser.add_argument("--tasks", nargs="*", default=list(syn.TASKS))
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--n", type=int, default=200, help="records of each task and length")
    parser.add_argument("--longeval", type=Path, help="a LongEval file of lines cases, checked only")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers")
    parser.add_argument("--json", type=Path, help="also append one JSON line for each row to this file")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    for length in args.lengths:
        for task in args.tasks:
            records = syn.make_records(task, length, args.n, SEED)
            cases = [(syn.prompt_of(r), r["answers"][0]) for r in records]
            floor = sum(map(syn.partial_key_floor, records)) / len(records)
            rows.append(measure(model, tokenizer, f"{task}_{length // 1024}k", cases, floor, args.show))
    if args.longeval:
        cases = [json.loads(line) for line in args.longeval.read_text().splitlines()]
        cases = [(case["prompt"], str(case["expected_number"])) for case in cases]
        rows.append(measure(model, tokenizer, "LongEval", cases, None, args.show))
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
