"""The embedded model's tasks, its training and the measurements of its attention."""

import argparse
import json
import re
import sys
import tomllib
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

import hillinfer.longbench.synthetic as syn
from hillinfer.assets import load_embedded

sys.path.append(str(Path(__file__).parents[1] / "data"))
import attention
import make_tasks
import train

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("task", syn.TASKS)
def test_half_of_a_key_is_not_enough(task):
    floors = [syn.partial_key_floor(record) for record in syn.make_records(task, 1024, 40, seed=1)]
    assert max(floors) < 0.55 and sum(floors) / 40 < 0.45


def test_a_tally_is_won_by_its_sum_alone():
    """Neither the word with the most lines nor the one with the largest numbers is right more often than by half."""
    right: Counter[str] = Counter()
    records = syn.make_records("tally", 1024, 200, seed=1)
    for record in records:
        asked, total, lines, large = syn.asked_key(record), Counter(), Counter(), Counter()
        for count, name, word in re.findall(r"(\d+) of (\S+) votes for (\w+)\.", record["context"]):
            if name == asked:
                total[word] += int(count)
                lines[word] += 1
                large[word] += int(count) >= 7
        (first, most), (_, second) = total.most_common(2)
        assert [first] == record["answers"] and most >= 1.2 * second
        for name, counts in (("lines", lines), ("large", large)):
            right[name] += counts.most_common(1)[0][0] == first
    assert max(right.values()) < 0.65 * len(records), right


def test_needles_stand_at_controlled_depths():
    records = syn.make_records("needle", 2048, 20, seed=1)
    off = [abs(syn.depth_of(record) - (i * 3 % 10 + 0.5) / 10) for i, record in enumerate(records)]
    assert sum(off) / len(off) < 0.05
    assert all(syn.depth_of(record) > 0.8 for record in islice(syn.in_window("passage", 1024, 0.2, seed=1), 30))


@pytest.mark.parametrize(("task", "tokens"), make_tasks.FILES)
def test_committed_records_are_what_the_script_makes(task, tokens):
    kept = syn.load_records(DATA / "tasks" / f"{task}_{tokens // 1024}k.jsonl")
    assert len(kept) == make_tasks.FILES[task, tokens]
    assert kept[:4] == syn.make_records(task, tokens, 4, make_tasks.SEED)


def test_the_committed_tokenizer_is_the_built_one():
    assert load_embedded()[1].get_vocab() == train.build_tokenizer.build().get_vocab()


@pytest.mark.parametrize("policy", ["full", "top", "window", "window+sinks", "random"])
def test_a_restriction_keeps_its_share(policy):
    rows, n = 3, 203
    causal = torch.arange(n - rows, n)[:, None] >= torch.arange(n)
    scores = torch.randn(2, rows, n).masked_fill(~causal, -torch.inf)
    keep = attention.Restriction(policy, 0.1).keep(scores, causal)
    assert not (keep & ~causal).any()
    if policy == "full":
        assert (keep == causal).all()
    else:
        assert (keep.sum(-1) == 20).all()
    if policy == "window+sinks":
        assert keep[..., :4].all() and not keep[..., 4:180].any()


def test_full_attention_by_hand_is_the_models_own():
    record, tokenizer = syn.make_records("passage", 1024, 1, seed=1)[0], load_embedded()[1]
    restriction = attention.Restriction()
    model, _ = attention.load(DATA / "model", restriction)
    _, loss = next(attention.answers(model, tokenizer, restriction, record, [("full", 1.0)]))
    ids = tokenizer(syn.prompt_of(record)).input_ids
    wanted = [*tokenizer(record["answers"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    logits = load_embedded()[0](torch.tensor([ids + wanted[:-1]])).logits[0, -len(wanted) :]
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)).item(), abs=1e-3)


def test_a_resumed_run_is_an_unbroken_one(tmp_path):
    settings = tomllib.loads((DATA / "train.toml").read_text())
    settings["train"]["checkpoint_steps"] = 2

    def weights(name: str, *steps: int) -> dict:
        for total in steps:
            settings["stage"] = [{"steps": total, "length": 128, "batch": 2, "tasks": {"lines": 0.5, "tally": 0.5}}]
            folders = {"out": tmp_path / name, "model": tmp_path / name / "model"}
            folders["out"].mkdir(exist_ok=True)
            train.work(0, argparse.Namespace(workers=1, compile=False, export=False, **folders), settings)
        kept = [json.loads(line)["step"] for line in (tmp_path / name / "curve.jsonl").read_text().splitlines()]
        assert kept == list(steps)
        return torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]

    resumed, unbroken = weights("resumed", 2, 4), weights("unbroken", 4)
    assert all(torch.equal(value, unbroken[key]) for key, value in resumed.items())
