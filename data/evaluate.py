"""Exact match of a model on held-out records and real LongEval cases, with 95 % intervals and the partial-key floor.

`python data/evaluate.py --n 200` evaluates data/model and prints one line per task and length. data/make_tasks.py
writes the first of the same records to data/tasks/; --n sets their number.
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


class Reader:
    """Greedy answers with the full cache, which is reused for consecutive questions about the same context."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.context, self.cache, self.length = None, None, 0

    @torch.inference_mode()
    def answer(self, context: str, question: str, answer: str) -> tuple[float, list[int], int]:
        """Share of answer tokens, including EOS, that greedy decoding gets right; its tokens; and the prompt length.

        One teacher-forced pass suffices if greedy decoding is right throughout, that is, if every answer token is the
        argmax. Otherwise the answer is decoded step by step.
        """
        end = self.tokenizer.eos_token_id
        if context != self.context:
            ids = self.tokenizer(context).input_ids
            out = self.model(torch.tensor([ids]), logits_to_keep=1, use_cache=True)
            self.context, self.cache, self.length = context, out.past_key_values, len(ids)
        question = self.tokenizer(question, add_special_tokens=False).input_ids
        wanted = [*self.tokenizer(answer, add_special_tokens=False).input_ids, end]
        given = self.step(question + wanted[:-1], len(wanted))
        self.forget()
        if given != wanted:
            given = self.step(question, 1)
            while given[-1] != end and len(given) < len(wanted):
                given += self.step(given[-1:], 1)
            self.forget()
        same = sum(a == b for a, b in zip(given, wanted, strict=False))
        return same / len(wanted), given, self.length + len(question)

    def step(self, ids: list[int], keep: int) -> list[int]:
        out = self.model(torch.tensor([ids]), past_key_values=self.cache, logits_to_keep=keep, use_cache=True)
        return out.logits[0].argmax(-1).tolist()

    def forget(self) -> None:
        """Crop the cache back to the context."""
        self.cache.crop(self.length - self.cache.get_seq_length())


DEPTHS = 5  # bins of the queried fact's depth


def measure(reader: Reader, name: str, cases: list[tuple], floor: float | None, show: int = 0) -> dict:
    """Ask all cases. A case is a context, a question, an answer, and the depth of the queried fact or None."""
    right, tokens, longest, began = 0, 0.0, 0, time.perf_counter()
    depths = [[0, 0] for _ in range(DEPTHS)]  # correct answers and questions per bin
    for context, question, answer, depth in cases:
        share, given, length = reader.answer(context, question, answer)
        right, tokens, longest = right + (share == 1), tokens + share, max(longest, length)
        if depth is not None:
            bin_ = depths[int(depth * DEPTHS)]
            bin_[:] = bin_[0] + (share == 1), bin_[1] + 1
        if share < 1 and show > 0:
            show -= 1
            print(f"  asked {question[-70:]!r} wanted {answer!r} got {reader.tokenizer.decode(given)!r}")
    low, high = interval(right, len(cases))
    row = {
        "name": name, "n": len(cases), "exact": right / len(cases), "low": low, "high": high,
        "tokens_right": tokens / len(cases), "floor": floor, "longest": longest,
        "depths": depths if any(asked for _, asked in depths) else None,
    }  # fmt: skip
    note = "floor 1.000 (no key parts shared)" if floor is None else f"floor {floor:.3f}"
    print(f"{name:14} n {row['n']:4}  exact match {row['exact']:.3f} [{low:.3f}, {high:.3f}]  {note}  tokens right "
          f"{row['tokens_right']:.3f}  longest prompt {longest}  {time.perf_counter() - began:.0f} s",
          flush=True)  # fmt: skip
    return row


def split(prompt: str, context: str) -> tuple[str, str]:
    """The prompt up to the last end of `context`, and the rest."""
    end = prompt.rindex(context) + len(context)
    return prompt[:end], prompt[end:]


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
    reader = Reader(model, AutoTokenizer.from_pretrained(args.model))
    rows = []
    for length in args.lengths:
        for task in args.tasks:
            records = syn.make_records(task, length, args.n, SEED)
            cases = [(*split(syn.prompt_of(r), r["context"]), r["answers"][0], syn.depth_of(r)) for r in records]
            floor = sum(map(syn.partial_key_floor, records)) / len(records)
            rows.append(measure(reader, f"{task}_{length // 1024}k", cases, floor, args.show))
    if args.longeval:
        cases = [json.loads(line) for line in args.longeval.read_text(encoding="utf-8").splitlines()]
        cases = [(*split(case["prompt"], ">\n"), str(case["expected_number"]), None) for case in cases]
        rows.append(measure(reader, "LongEval", cases, None, args.show))
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
