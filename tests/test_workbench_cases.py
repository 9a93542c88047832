"""What the dashboard can ask: rows of benchmarks, own files, and models from a field."""

import json
import zipfile
from importlib.util import find_spec

import pytest

from hillinfer import UsageError
from hillinfer.assets import load_embedded
from hillinfer.documents import read_document
from hillinfer.longbench.job import prompt_of
from hillinfer.longbench.models import load_checked
from hillinfer.longbench.tasks import find_task
from hillinfer.workbench.cases import TEXT, Case, rows_of, tasks_of
from hillinfer.workbench.live import LiveRun
from tests.longbench_rows import rows, write_model, write_rows
from tests.tiny_gguf import tiny_llama, write

pytest.importorskip("datasets", reason="pip install 'hillinfer[longbench]'")


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), ["hotpotqa", "samsum"], words=60)


def pdf(text: str) -> bytes:
    """A PDF of one page, by hand: a reader has to do with what others write."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>"]
    objects += [b"<</Type/Page/Parent 2 0 R/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>"]
    objects += [b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream)]
    objects += [b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + tail


def test_a_row_is_asked_as_eval_asks_it(embedded, data):
    model, tokenizer = embedded
    records, source = rows_of("hotpotqa", str(data))
    case = Case.row(tokenizer, model.config, "hotpotqa", records[1], 2)
    prompt = prompt_of(find_task("hotpotqa"), records[1], model.config, tokenizer)
    assert case.context + case.question == prompt.ids and case.max_new_tokens == 32
    assert str(data) in source and case.title.startswith("hotpotqa, row 2") and not case.shortened
    assert case.score("the old mill") == 1 and 0 < case.score("an old house") < 1
    run = LiveRun(model, tokenizer, case, "topk", dict(alpha=0.5))
    run.start().result()
    assert run.score == case.score(run.answer) and run.right is None  # parts of a point: neither right nor wrong


def test_a_long_row_is_truncated_and_says_so(embedded, data, tmp_path):
    model, tokenizer = embedded
    [record] = rows("hotpotqa", 1, words=9000)
    case = Case.row(tokenizer, model.config, "hotpotqa", record)
    assert case.shortened > 8192 > len(case.context) and f"of {case.shortened:,}" in case.title


def test_the_end_of_an_answer_is_the_tasks(embedded, data):
    model, tokenizer = embedded
    case = Case.row(tokenizer, model.config, "samsum", rows_of("samsum", str(data))[0][0])
    newline = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    assert newline in case.rules(tokenizer)["eos_token_id"]
    assert Case.task(tokenizer, "lines", 1024, 1).rules(tokenizer) == {}


def test_tasks_named_after_files(tmp_path):
    for name in ("200_lines.jsonl", "1000_lines.jsonl", "niah_single_1/validation.jsonl", "vt.jsonl", "other.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    assert tasks_of("LongEval", str(tmp_path)) == ["longeval_200", "longeval_1000"]
    assert tasks_of("RULER", str(tmp_path)) == ["ruler_niah_single_1", "ruler_vt"]
    with zipfile.ZipFile(tmp_path / "cases.zip", "w") as archive:
        archive.writestr("testcases/300_lines.jsonl", "{}")
    assert tasks_of("LongEval", str(tmp_path / "cases.zip")) == ["longeval_300"]
    assert len(tasks_of("LongBench")) == 21 and len(tasks_of("LongBench-E")) == 13
    with pytest.raises(UsageError, match="does not exist"):
        tasks_of("RULER", str(tmp_path / "none"))


def test_own_files(tmp_path):
    (tmp_path / "note.md").write_text("a café\n", encoding="utf-8")
    assert read_document(str(tmp_path / "note.md")) == "a café\n"
    (tmp_path / "old.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(UsageError, match="no UTF-8 text"):
        read_document(str(tmp_path / "old.txt"))
    with pytest.raises(UsageError, match="there is no file"):
        read_document(str(tmp_path / "none.txt"))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        read_document(str(tmp_path / "blank.txt"))
    pytest.importorskip("pypdf", reason="pip install 'hillinfer[pdf]'")
    (tmp_path / "r.pdf").write_bytes(pdf("The code is 4711."))
    assert read_document(str(tmp_path / "r.pdf")) == "The code is 4711."
    for content, message in ((pdf(""), "no text, only pictures"), (b"%PDF-1.4 broken", "cannot read")):
        (tmp_path / "bad.pdf").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_document(str(tmp_path / "bad.pdf"))


def test_own_text_is_a_turn_where_the_tokenizer_has_turns(embedded, monkeypatch):
    tokenizer = embedded[1]
    template = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<answer>"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    case = Case.text(tokenizer, "line one.", "Which line?", 4)
    assert tokenizer.decode(case.question) == "Which line?</user><answer>"
    assert tokenizer.decode(case.context) == "<user>line one.\n\n"


def test_a_model_is_loaded_with_progress_and_only_if_it_fits(tmp_path, monkeypatch):
    folder, seen = write_model(tmp_path / "model"), []
    model, tokenizer = load_checked(str(folder), lambda what, share: seen.append((what, share)))
    assert model.config.model_type == "qwen3" and len(tokenizer) > 0
    shares = [share for what, share in seen if "weights" in what.lower()]
    assert len(shares) > 5 and shares == sorted(shares) and shares[-1] > 0.8
    if all(map(find_spec, ("gguf", "accelerate"))):
        load_checked(str(write(tmp_path / "tiny.gguf", tiny_llama())), lambda what, share: seen.append((what, share)))
        told = [(what, share) for what, share in seen if "tiny.gguf: unpacking tensor" in what]
        assert (
            told[-1] == (f"{tmp_path / 'tiny.gguf'}: unpacking tensor {len(told)} of {len(told)}", 1) and len(told) > 20
        )
    monkeypatch.setattr("hillinfer.pipeline.memory.AT_WORK", 1 << 50)
    with pytest.raises(UsageError, match="choose a smaller model"):
        load_checked(str(folder), print)
    with pytest.raises(UsageError, match="cannot load model"):
        load_checked(str(tmp_path / "none"), print)


@pytest.fixture
def workbench(embedded, tmp_path):
    pytest.importorskip("anywidget", reason="pip install 'hillinfer[lab]'")
    from hillinfer.workbench import Workbench

    made = Workbench(drive=tmp_path)
    made.show()
    yield made
    made.close()


def test_the_dashboard_shows_a_row_and_asks_it(workbench, data):
    workbench.data.value, workbench.origin.value = str(data), "LongBench"
    workbench.task.value, workbench.number.value = "hotpotqa", 2
    workbench.prompt.background.wait()
    shown = workbench.prompt.preview.value
    assert "Question 1: {braces} stay?" in shown and "the old mill" in shown and "row 2 of 3" in shown
    workbench.system.value = "topk"
    workbench.run()
    assert workbench.runs[-1].case.record["_id"] == "hotpotqa-1"
    state = workbench._boards[-1].state
    assert state["metric"] == "qa_f1" and state["score"] is not None and state["right"] is None
    workbench.task.value = "qasper"
    workbench.prompt.background.wait()
    assert "qasper" in workbench.message.value and "error" in workbench.message.value
    workbench.origin.value = TEXT
    assert workbench.task.layout.display == "none" and workbench.file.layout.display == "flex"


def test_the_dashboard_loads_a_model_from_the_field(workbench, tmp_path):
    folder = write_model(tmp_path / "model", window=2048)
    workbench.chosen.field.value = str(folder)
    workbench.run_button.click()
    assert "is not loaded: press Load" in workbench.message.value
    workbench.chosen.button.click()
    workbench.chosen.background.wait()
    assert workbench.model.config.max_position_embeddings == 2048 and workbench.tokens.options == (1024, 2048)
    assert workbench.chosen.bar.layout.display == "none" and not workbench.chosen.button.disabled
    workbench.system.value, workbench.task.value, workbench.tokens.value = "topk", "lines", 1024
    assert isinstance(workbench.run(), str) and str(folder) in json.dumps(workbench._boards[-1].state)
