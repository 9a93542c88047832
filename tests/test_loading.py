"""Models as people have them: GGUF files load to the model they were written from; a broken one is one clear line."""

import json
import random
import re
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

import hillinfer
from hillinfer import gguf_file, loading
from hillinfer.assets import data_folder
from hillinfer.commands import console, continuation
from hillinfer.commands.app import app
from hillinfer.errors import UsageError
from hillinfer.fingerprint import fingerprint
from hillinfer.longbench.models import describe
from tests.tiny_gguf import END, tiny_llama, write

gguf = pytest.importorskip("gguf", reason="pip install 'hillinfer[gguf]'")
pytest.importorskip("accelerate", reason="pip install 'hillinfer[gguf]'")
IDS = torch.tensor([[5, 80, 200, 3, 7]])


@pytest.fixture(scope="module")
def source():
    return tiny_llama()


@pytest.fixture(scope="module")
def file(source, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", source)


def refused(name, *said):
    with pytest.raises(UsageError) as error:
        hillinfer.load_model(str(name))
    line = str(error.value)
    assert line.count("give ") < 2  # one error inside another
    assert len(line.splitlines()) == 1 and all(word in line for word in said), line


@pytest.mark.parametrize(("kind", "error"), [("F32", 1e-6), ("Q8_0", 0.02), ("Q4_1", 0.3)])
def test_a_gguf_file_is_the_model_it_was_written_from(source, tmp_path, kind, error):
    model, tokenizer = hillinfer.load_model(str(write(tmp_path / "tiny.gguf", source, kind)), "float32")
    with torch.inference_mode():
        want, got = source(IDS).logits, model(IDS).logits
    assert got.dtype == torch.float32 and (got - want).abs().max() < error * want.abs().max()
    assert tokenizer.decode(tokenizer("the other" + END).input_ids) == "the other" + END
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    dense, same = hillinfer.load_model(str(tmp_path / "dense"), "float32")
    assert torch.equal(dense(IDS).logits, got) and same.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer("the").input_ids) == 1 and tokenizer.eos_token_id == 258


def test_reading_fast_changes_nothing(file, source, tmp_path, monkeypatch):
    more = write(tmp_path / "more.gguf", source, "Q8_0", tokenizer__ggml__scores=[0.5, -1e9], flags=[True, False])
    with gguf_file.read_fast(1, None):
        Reader = gguf.GGUFReader
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert gguf.GGUFReader is gguf.gguf_reader.GGUFReader is not Reader
    assert gguf.dequantize is gguf.quants.dequantize
    fast, slow = Reader(more), gguf.GGUFReader(more)
    assert list(fast.fields) == list(slow.fields) and "flags" in fast.fields
    for name, field in slow.fields.items():
        got, want = ([one.parts[i] for i in one.data] for one in (fast.fields[name], field))
        assert [list(part) for part in got] == [list(part) for part in want], name
        assert not want or fast.fields[name].types == field.types
    assert {type(part) for part in fast.fields["tokenizer.ggml.tokens"].parts[3:]} == {bytes}
    model, tokenizer = hillinfer.load_model(str(more), "float32")
    monkeypatch.setattr(gguf_file, "read_fast", lambda tensors, tell: nullcontext())
    same, words = hillinfer.load_model(str(more), "float32")
    assert model.config.to_dict() == same.config.to_dict()
    assert tokenizer.backend_tokenizer.to_str() == words.backend_tokenizer.to_str()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_each_tensor_is_told(file):
    heard = []
    loading.load_weights(
        str(file), loading.load_pretrained(AutoConfig, str(file)), torch.float32, lambda *said: heard.append(said)
    )
    total = len(gguf_file.read(file).tensors)
    assert heard == [(f"unpacking tensor {n} of {total}", n / total) for n in range(1, total + 1)] and total > 20


def test_every_form_of_a_name(file, source, monkeypatch, tmp_path):
    blob = tmp_path / "sha256-12ab"  # as Ollama keeps them
    blob.write_bytes(file.read_bytes())
    monkeypatch.setattr(loading, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *name, local_files_only: str(file))
    source.save_pretrained(tmp_path / "folder")
    for name in (file, blob, "some/where:tiny.gguf", tmp_path / "folder"):
        assert loading.load_pretrained(AutoConfig, str(name)).num_key_value_heads == 2
    names = {loading.model_path(str(name)) for name in (file, file.parent / ".." / file.parent.name / file.name)}
    assert names == {str(file)} and loading.model_path("some/where:tiny.gguf") == "some/where:tiny.gguf"


def test_a_session_knows_the_models_file_again(file, source, tmp_path):
    one, again, other = (
        fingerprint(hillinfer.load_model(str(path), "float32")[0])
        for path in (file, file, write(tmp_path / "other.gguf", source, "Q4_0"))
    )
    assert one == again != other


def test_run_answers_and_continues_a_session_with_a_gguf_file(file, tmp_path):
    (tmp_path / "doc.txt").write_text("the sun is hot and the sea is deep. " * 9)
    words = ["run", "--model", file, "--prompt", "the sea", "--document", tmp_path / "doc.txt", "--system", "topk"]
    words += ["--session", tmp_path / "doc.kv", "--max-new-tokens", 4, "--dtype", "float32"]
    first, second = (CliRunner().invoke(app, list(map(str, words))) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    assert first.stdout == second.stdout != "" and "weights in float32 on" in first.stderr


def test_run_asks_a_question_as_the_models_chat_has_it(source, tmp_path, monkeypatch):
    template = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<answer>"
    chat, asked, real = (
        write(tmp_path / "chat.gguf", source, tokenizer__chat_template=template),
        [],
        continuation.decode,
    )
    monkeypatch.setattr(continuation, "decode", lambda *words, **more: asked.append(words[2]) or real(*words, **more))
    (tmp_path / "doc.txt").write_text("the sun is hot.\n")
    ask = ["run", "--model", str(chat), "--system", "topk", "--max-new-tokens", "2", "--question", "what is hot?"]
    answer = CliRunner().invoke(app, [*ask, "--document", str(tmp_path / "doc.txt")])
    assert answer.exit_code == 0, answer.output
    said = loading.load_pretrained(AutoTokenizer, str(chat)).decode(asked[0])
    assert said == "<user>the sun is hot.\n\n\nwhat is hot?</user><answer>"
    refusal = CliRunner().invoke(app, ask)
    assert refusal.exit_code == 2 and "--document FILE with a --question TEXT" in refusal.stderr


def test_an_eval_takes_a_gguf_file_and_names_its_dtype(file, tmp_path):
    words = ["eval", "--model", file, "--tasks", "lines_2k", "--systems", "full", "--samples", 1, "--max-length", 200]
    result = CliRunner().invoke(app, list(map(str, [*words, "--dtype", "float32", "--out", tmp_path])))
    assert result.exit_code == 0 and f"Weights of {file}: float32." in result.stdout, result.output
    assert json.loads((tmp_path / "manifest.json").read_text())["models"][str(file)]["dtype"] == "float32"


def test_an_eval_tells_two_files_apart(file, source, tmp_path):
    one, other = describe(str(file), None), describe(str(write(tmp_path / "other.gguf", source, "Q4_0")), None)
    assert one["fingerprint"] != other["fingerprint"] and one["dtype"] in ("float32", "bfloat16")
    with pytest.raises(UsageError, match="lower --max-length"):
        describe(str(file), None, tokens=513)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(arch="clip"), ["clip", "text model that transformers knows"]),
        (dict(drop=["tokenizer"]), ["no tokenizer", "complete text model"]),
        (dict(drop=["blk.1.ffn_down"]), ["lacks 1 weights", "layers.1.mlp.down_proj", "download it again"]),
        (dict(split__count=3), ["llama-gguf-split --merge"]),
        (dict(llama__rope__scaling__type="yarn"), ["RoPE", "original model"]),
        (dict(drop=["llama.embedding_length"]), ["cannot load model", "give the .gguf file"]),
    ],
)
def test_a_whole_file_that_is_no_model_of_text(source, tmp_path, change, said):
    refused(write(tmp_path / "odd.gguf", source, **change), "odd.gguf", *said)


def test_damaged_files(file, tmp_path):
    content, odd = file.read_bytes(), tmp_path / "odd.gguf"
    start = gguf_file.read(file).end
    for part, *said in (
        (content[:-9000], "cut short", f"of {len(content):,} bytes", "download it again"),
        (content[: start // 2], "damaged", "download it again"),
        (content[:4], "damaged", "download it again"),
        (content[:4] + b"\0\0\0\x03" + content[8:], "damaged", "version", "download it again"),
        (b"", "odd.gguf is no GGUF file"),
        (b"PK\3\4 a zip", "odd.gguf is no GGUF file", "PK", "give a .gguf file or a folder"),
    ):
        odd.write_bytes(part)
        refused(odd, "odd.gguf", *said)


def test_any_flipped_bit_of_the_header_is_refused_or_harmless(file, tmp_path):
    content, draw, odd = file.read_bytes(), random.Random(1), tmp_path / "odd.gguf"
    end, refusals = gguf_file.read(file).end, 0
    for _ in range(400):
        broken = bytearray(content)
        broken[draw.randrange(end)] ^= 1 << draw.randrange(8)
        odd.write_bytes(broken)
        try:
            gguf_file.check(odd)
        except UsageError:
            refusals += 1
    assert 50 < refusals < 400


def test_a_flipped_bit_that_the_header_hides_is_found_in_loading(file, tmp_path):
    content, odd = file.read_bytes(), tmp_path / "odd.gguf"
    at = content.index(b"llama.embedding_length") + len("llama.embedding_length") + 4
    for bit in (1, 6, 31):  # 64 becomes 66, 0, two billion
        broken = bytearray(content)
        broken[at + bit // 8] ^= 1 << bit % 8
        odd.write_bytes(broken)
        refused(odd, "odd.gguf", "give the .gguf file")


@pytest.mark.parametrize("kind", [15, 99])  # Q8_K, which gguf cannot unpack; none at all
def test_a_quantisation_that_cannot_be_unpacked(file, tmp_path, kind):
    content = bytearray(file.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    content[at] = kind
    (odd := tmp_path / "odd.gguf").write_bytes(content)
    refused(odd, "Q8_K" if kind == 15 else "number 99", "blk.0.ffn_up.weight", "such as Q4_K_M or Q8_0")


def test_missing_files_and_packages(file, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    refused(tmp_path / "nowhere.gguf", "nowhere.gguf", "there is no file")
    refused("some/where:tiny.gguf", "some/where:tiny.gguf", "not in the hub's cache", "network")
    refused(file.parent, "no config.json", "tiny.gguf")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    refused(file, "tiny.gguf", "pip install 'hillinfer[gguf]'")


@pytest.mark.parametrize(
    ("flags", "saved", "want"),
    [
        ("fpu avx512f avx512_bf16", "bfloat16", torch.bfloat16),
        ("fpu amx_bf16", "bfloat16", torch.bfloat16),
        ("fpu avx512f avx2", "bfloat16", torch.float32),
        ("fpu avx512_bf16", "float32", torch.float32),
        ("fpu avx512_bf16", "float16", torch.float32),
        (None, "bfloat16", torch.float32),
    ],
)
def test_auto_dtype_is_what_the_cpu_does_fast(monkeypatch, flags, saved, want):
    monkeypatch.setattr(loading, "cpu_info", lambda field: [flags] * 2 if flags and field == "flags" else [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = LlamaConfig(dtype=saved)
    assert loading.choose_dtype("some/where", config) == want
    assert loading.choose_dtype("some/where", config, "float16") == torch.float16
    assert loading.choose_dtype("embedded", config) == torch.float32
    assert loading.choose_dtype(str(data_folder("model")), config) == torch.float32
    fast = torch.bfloat16 if flags and "bf16" in flags else torch.float32
    assert loading.choose_dtype("some/where:file.gguf", LlamaConfig()) == fast


def test_progress_into_a_file_is_lines_while_it_moves(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_S", 0.05)
    with console.progress() as bars, console.working("loading [x]") as tell:
        bar = bars.add_task("answers", total=48)
        for _ in range(2):
            bars.advance(bar, 12)
            time.sleep(0.2)
        tell("prefill")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    counts = [line for line in lines if line.startswith("answers")]
    assert counts == [f"answers {done}/48, 0:00 elapsed" for done in (12, 24)]
    assert [line.partition(",")[0] for line in lines if line not in counts] == ["loading [x]", "prefill"]
    assert all(re.search(r", \d+:\d\d elapsed$", line) for line in lines)
