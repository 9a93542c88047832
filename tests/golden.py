"""The golden record: tokens, hits, bytes and memory of every system on every tier, two settings each.

`python -m tests.golden` compares this tree with tests/golden.json; `--write` replaces the file. Integer results depend
on nothing but the code, and the tokens of a model with such wide weights on no rounding; the record still names its
instruction set, since floating-point sums may differ between two.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter
from concurrent.futures import Executor, Future
from pathlib import Path
from unittest import mock

import torch

import hillinfer
from hillinfer import native
from hillinfer.tiers.log import Writer
from tests.conftest import FAMILIES, seeded

RECORD = Path(__file__).with_suffix(".json")
TIERS = {"memory": {}, "ssd": {"drive_kind": "ssd"}, "emulated": {"drive_kind": "emulated"}}
SETTINGS = {
    "one": {"alpha": 0.1, "lookahead": False},
    "padded": {"alpha": 0.3, "lookahead": True, "precision": "int4", "host_budget": 400_000},
}
OWN = {  # what is chosen by the clock is fixed here
    "leoam": {"one": {"compress": 0.0}, "padded": {"compress": 0.5}},
    "dualblade": {how: {"host_budget": 130_000, "pipelining": "intra"} for how in SETTINGS},
    "flexgen": {how: {"pipelining": "cross"} for how in SETTINGS},
}
TIMED = ("wait",)  # spans without work: how many there are is the clock's choice


def write_now(self, nbytes: int, job) -> Future:
    """`Writer.submit` without the thread, so that what a read finds on the drive depends on no clock."""
    future = Future()
    future.set_result(job())
    return future


class AtOnce(Executor):
    """Runs a guess and its reads when they are submitted: what they find depends on no clock."""

    def __init__(self, *_):
        pass

    def submit(self, work, *args) -> Future:
        future = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def cases() -> list[tuple[str, str, str]]:
    return [(name, tier, how) for name in hillinfer.list_systems() for tier in TIERS for how in SETTINGS]


def measure(model, system: str, tier: str, how: str) -> dict | str:
    """The result of one case; the error message if the case is not supported."""
    torch.manual_seed(11)
    prompt = torch.randint(2, 97, (1 if how == "one" else 2, 300))
    if how == "padded":
        prompt[1, :40] = 0
    mask = (prompt != 0).long()
    words = dict(do_sample=False, num_beams=1)
    guesses = mock.patch("hillinfer.pipeline.lookahead.ThreadPoolExecutor", AtOnce)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Writer, "submit", write_now), guesses:
        options = SETTINGS[how] | OWN.get(system, {}).get(how, {}) | TIERS[tier]
        if tier == "memory":
            options.pop("host_budget", None)
        else:
            options["drive"] = folder
        try:
            cache = hillinfer.make_cache(model, system, **options)
        except hillinfer.UsageError:
            return "refused"
        with cache:
            first = model.generate(prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=24, **words)
            cache.crop(-10)
            turn = torch.cat((first[:, :-11], prompt[:, -30:]), 1)
            seen = torch.cat((mask, mask.new_ones(len(mask), turn.shape[1] - mask.shape[1])), 1)
            second = model.generate(turn, attention_mask=seen, past_key_values=cache, max_new_tokens=16, **words)
            hits = cache.counters.frame().drop(columns="fresh")  # younger than the record
            spans = [span for span in cache.timeline.spans if span.kind not in TIMED]
            moved, calls = Counter(), Counter()
            for span in spans:
                moved[f"{span.lane} {span.kind}"] += span.bytes
                calls[f"{span.lane} {span.kind}"] += 1
            return {
                "tokens": [first[:, 300:].tolist(), second[:, turn.shape[1] :].tolist()],
                "hits": hits.sum().drop(["step", "layer"]).astype(int).to_dict(),
                "hits of each layer and step": hash_of(hits.to_csv(index=False)),
                "bytes": dict(sorted(moved.items())),
                "spans": dict(sorted(calls.items())),
                "memory": cache.memory(),
            }


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record() -> dict:
    model = seeded(FAMILIES["llama"])
    return {" ".join(case): measure(model, *case) for case in cases()}


def differences(old: dict, new: dict) -> list[str]:
    out = []
    for name in sorted(old.keys() | new.keys()):
        one, other = old.get(name), new.get(name)
        if one != other:
            if isinstance(one, dict) and isinstance(other, dict):
                one, other = ({k: v for k, v in a.items() if v != b.get(k)} for a, b in ((one, other), (other, one)))
            out.append(f"{name}:\n  was {one}\n  is  {other}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--file", type=Path, default=RECORD)
    arguments = parser.parse_args()
    found = {"instruction set": native.isa(), "cases": record()}
    if arguments.write:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(own)}" for name, own in found["cases"].items())
        head = json.dumps(found["instruction set"])
        arguments.file.write_text(f'{{"instruction set": {head},\n "cases": {{\n{lines}\n}}}}\n')
        return
    old = json.loads(arguments.file.read_text())
    lines = differences(old["cases"], found["cases"])
    print("\n".join(lines) or f"{len(found['cases'])} cases, none differs")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
