"""Tasks, rows and prompts match LongBench's to the token."""

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hillinfer.assets import data_folder
from hillinfer.errors import UsageError
from hillinfer.longbench import sources
from hillinfer.longbench.prompts import build, official_max_length
from hillinfer.longbench.sources import load, load_all
from hillinfer.longbench.synthetic import load_records, prompt_of
from hillinfer.longbench.tasks import ENGLISH, bundled, find_task, find_tasks, longbench
from tests.longbench_rows import rows, write_rows

pytest.importorskip("datasets", reason="pip install 'hillinfer[longbench]'")
V1 = [task.name for task in longbench().values() if task.suite == "longbench"]
REAL = os.environ.get("LONGBENCH_ROWS")
CHAT = "{% for m in messages %}<user>{{ m['content'] | trim }}</user>{% endfor %}<model>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data_folder("model"))


def official(tokenizer, text: str, max_length: int) -> list[int]:
    """Reimplementation of pred.py of THUDM/LongBench."""
    tokenized = tokenizer(text, truncation=False, return_tensors="pt").input_ids[0]
    if len(tokenized) > max_length:
        half = int(max_length / 2)
        text = tokenizer.decode(tokenized[:half], skip_special_tokens=True) + tokenizer.decode(
            tokenized[-half:], skip_special_tokens=True
        )
    return tokenizer(text, truncation=False).input_ids


def test_groups():
    assert len(V1) == 21 and len(find_tasks(["longbench-e"])) == 13 and len(find_tasks(["longbench-en"])) == 16
    assert [task.name for task in find_tasks(["own", "lines_1k"])] == list(bundled())
    assert {name for name in V1 if not longbench()[name].chat} == set(
        "trec triviaqa samsum lsht lcc repobench-p".split()
    )
    assert {name for name in V1 if longbench()[name].first_line} == set("trec triviaqa samsum lsht".split())
    assert sum(longbench()[name].language == "zh" for name in V1) == 5
    assert set(ENGLISH) == {name for name in V1 if longbench()[name].language == "en"}
    for wrong in ("hotpot", "ruler_magic_1", "qmsum_e", "longeval_x"):
        with pytest.raises(UsageError, match="no task"):
            find_task(wrong)


@pytest.mark.skipif(REAL is None, reason="LONGBENCH_ROWS names no folder with official/")
def test_templates_and_lengths_are_the_official_ones():
    for name, field in (("dataset2prompt", "template"), ("dataset2maxlen", "max_new_tokens")):
        wanted = json.loads((Path(REAL) / "official" / f"{name}.json").read_text(encoding="utf-8"))
        assert {task: getattr(longbench()[task], field) for task in V1} == wanted


@pytest.mark.parametrize("task", V1)
def test_prompts_are_official_at_several_windows(tokenizer, task, tmp_path):
    """On generated rows, and on real ones if available."""
    records = rows(task)
    if REAL is not None and (Path(REAL) / f"{task}.jsonl").exists():
        records += load(longbench()[task], [Path(REAL)])[0][:3]
    for record in records:
        text = longbench()[task].template.format(**record)
        assert "".join(longbench()[task].parts(record)) == text
        for max_length in (64, 255, 1000, 3500, 1 << 20):
            prompt = build(longbench()[task], record, tokenizer, max_length, chat=False)
            assert prompt.ids == official(tokenizer, text, max_length)
            assert prompt.original == len(tokenizer(text).input_ids)
            assert prompt.truncated == (prompt.original > max_length)
            assert 2 <= prompt.document < len(prompt.ids)


def test_a_question_is_fed_and_a_document_prefilled(tokenizer):
    task = longbench()["hotpotqa"]
    record = rows("hotpotqa")[0]
    prompt = build(task, record, tokenizer, 1 << 20, chat=False)
    assert tokenizer.decode(prompt.ids[prompt.document :]) == task.parts(record)[1]
    whole = build(task, record, tokenizer, 1 << 20, chat=False, stepwise=False)
    assert whole.ids == prompt.ids and whole.document == len(whole.ids) - 1


def test_the_chat_template_comes_after_the_cut_and_not_for_all_tasks(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(data_folder("model"))
    tokenizer.chat_template = CHAT
    for name in ("hotpotqa", "trec"):
        record = rows(name)[0]
        prompt = build(longbench()[name], record, tokenizer, 100, chat=True)
        text = tokenizer.decode(prompt.ids, skip_special_tokens=True)
        assert text.startswith("<user>") == text.endswith("</user><model>") == (name == "hotpotqa")
        assert prompt.truncated
        if name == "hotpotqa":
            assert prompt.ids[0] != tokenizer.bos_token_id  # the template decides about special tokens
            plain = build(longbench()[name], record, tokenizer, 100, chat=False)
            assert len(prompt.ids) - prompt.document > len(plain.ids) - plain.document  # what follows the turn is fed


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "half a surrogate pair"])
def test_rows_in_another_encoding_are_one_short_line(tmp_path, encoding):
    row = dict(input="Wer hütet?", context="Die Lampe glüht. " * 2000, answers=["Marlo"], length=240)
    row |= dict(dataset="hotpotqa", language="de", all_classes=None, _id="a")
    if encoding.startswith("half"):
        raw = json.dumps(row | {"context": "\ud83d x " * 2000}).encode()
    else:
        raw = json.dumps(row, ensure_ascii=False).encode(encoding)
    (tmp_path / "hotpotqa.jsonl").write_bytes(raw)
    with pytest.raises(UsageError, match=r"hotpotqa\.jsonl.*UTF-8") as caught:
        load(longbench()["hotpotqa"], [tmp_path])
    assert len(str(caught.value)) < 500


def test_limits_by_window():
    assert [official_max_length(k << 10) for k in (4, 8, 16, 32, 128)] == [3500, 7500, 15500, 31500, 127500]
    with pytest.raises(UsageError, match="--max-length"):
        official_max_length(512)


def test_own_tasks_are_asked_as_before(tokenizer):
    for task in bundled().values():
        record = load(task)[0][0]
        prompt = build(task, record, tokenizer, 1 << 20, chat=False)
        assert prompt.ids == tokenizer(prompt_of(record)).input_ids
        assert tokenizer.decode(prompt.ids[: prompt.document]).endswith(record["context"])
        assert load(task)[1].kind == "bundled" and "not a LongBench score" in str(load(task)[1])


def test_rows_come_from_a_folder_and_then_from_a_zip(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_rows(tmp_path / "rows", ["trec", "lcc_e"])
    content = (folder / "trec.jsonl").read_bytes()
    records, source = load(longbench()["trec"], [folder])
    assert (source.kind, source.sha256) == ("folder", hashlib.sha256(content).hexdigest())
    assert records == rows("trec") and records[0]["all_classes"]
    (folder / "data").mkdir()
    (folder / "trec.jsonl").rename(folder / "data" / "trec.jsonl")
    assert load(longbench()["trec"], [folder])[1].kind == "folder"
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(folder / "data" / "trec.jsonl", "data/trec.jsonl")
    for place in (archive, tmp_path):
        assert load(longbench()["trec"], [place])[1].kind == "zip"
    monkeypatch.setenv("LONGBENCH_DIR", str(folder))
    assert load(longbench()["trec"])[1].kind == "folder"
    task = longbench()["lcc_e"]
    assert [task.buckets(record) for record in load(task, [folder])[0]] == [["0-4k"], ["4-8k"], ["8k+"]]


def test_the_hub_is_asked_for_the_official_zip(tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("data/trec.jsonl", json.dumps(rows("trec")[0]))
    asked = {}

    def download(repository, name, **options):
        asked.update(options, repository=repository, name=name)
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    records, source = load(longbench()["trec"], revision="abc")
    assert (asked["repository"], asked["name"], asked["repo_type"]) == ("zai-org/LongBench", "data.zip", "dataset")
    assert len(records) == 1 and source.kind == "hub" and "abc" in source.path
    with pytest.raises(UsageError, match="has no lcc"):
        load(longbench()["lcc"])


def test_out_of_reach_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("LONGBENCH_DIR", raising=False)
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"no network.*--data.*--tasks own"):
        load(longbench()["hotpotqa"])
    assert time.monotonic() - began < 5
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there: no retries either
    with pytest.raises(UsageError, match="no network"):
        load(longbench()["hotpotqa"])
    assert time.monotonic() - began < 5
    assert {source.kind for _, _, source in load_all(["auto"])} == {"bundled"}
    with pytest.raises(UsageError, match="--data"):
        load(find_task("ruler_niah_single_1"))
    with pytest.raises(UsageError, match="does not exist"):
        load(longbench()["hotpotqa"], [tmp_path / "nowhere"])


@pytest.mark.parametrize("content", ["", "no json", '{"input": "x"}', json.dumps(rows("trec")[0] | {"length": "many"})])
def test_files_that_are_no_rows_are_refused(tmp_path, content):
    (tmp_path / "trec.jsonl").write_text(content)
    with pytest.raises(UsageError, match="official file"):
        load(longbench()["trec"], [tmp_path])


def test_equal_ids_are_told_apart(tmp_path):
    line = json.dumps(rows("trec")[0])
    (tmp_path / "trec.jsonl").write_text(f"{line}\n{line}\n")
    assert [record["_id"] for record in load(longbench()["trec"], [tmp_path])[0]] == ["trec-0", "trec-0#2"]


def test_other_suites_become_rows(tmp_path, tokenizer):
    choices = {f"choice_{letter}": f"  {letter.lower()} " for letter in "ABCD"}
    v2 = {"_id": "1", "question": "Why?", "context": " text ", "answer": "B", "difficulty": "hard", "length": "short"}
    (tmp_path / "data.json").write_text(json.dumps([v2 | choices]))
    task = find_task("longbench-v2")
    record = load(task, [tmp_path])[0][0]
    assert "".join(task.parts(record)) == (
        "Please read the following text and answer the question below.\n\n<text>\ntext\n</text>\n\n"
        "What is the correct answer to this question: Why?\nChoices:\n(A) a\n(B) b\n(C) c\n(D) d\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert task.buckets(record) == ["hard", "short"] and record["answers"] == ["B"]
    line = {"prompt": "line a-b: <1>\nNow the record is over. Tell me.", "expected_number": 1, "random_idx": ["a-b", 0]}
    (tmp_path / "5_lines.jsonl").write_text(json.dumps(line))
    record = load(find_task("longeval_5"), [tmp_path])[0][0]
    assert record["context"] + record["input"] == line["prompt"] and record["input"].startswith("Now")
    needle = {"index": 0, "input": "hay\nhay\nWhat is it?", "outputs": ["1"], "length": 9, "answer_prefix": " It is"}
    (tmp_path / "niah_single_1").mkdir()
    (tmp_path / "niah_single_1" / "validation.jsonl").write_text(json.dumps(needle))
    task = find_task("ruler_niah_single_1")
    record = load(task, [tmp_path])[0][0]
    assert "".join(task.parts(record)) == "hay\nhay\nWhat is it? It is" and record["context"] == "hay\nhay\n"


def test_own_files_are_rows_of_eight_fields():
    for path in data_folder("tasks").glob("*.jsonl"):
        assert sources.checked(load_records(path)[:2])
