"""A saved document gives the answers of a fresh prefill on any system; incomplete sessions are rejected."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import FalconH1Config, Zamba2Config

import hillinfer
from hillinfer import UsageError, open_session, save_session
from hillinfer.fingerprint import fingerprint
from hillinfer.longbench.runner import feed
from hillinfer.session import check_keeps
from hillinfer.session_file import PART, Saved

ALL = hillinfer.list_systems()
SYSTEMS = [name for name, found in ALL.items() if found.policy.late]


@pytest.fixture
def model(models):
    return models("llama")


def answer(model, cache, ids: list[int], question: list[int]) -> list[int]:
    feed(model, cache, question[:-1])
    whole = torch.tensor([[*ids, *question]])
    mask = torch.ones_like(whole)
    out = model.generate(whole, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)
    return out[0, whole.shape[1] :].tolist()


def saved(model, prompt, path, chunk=None, **options):
    """A session of the prompt, and its ids."""
    ids = prompt[0].tolist()
    with hillinfer.make_cache(model, "full", **options) as cache:
        feed(model, cache, ids, chunk)
        save_session(cache, path, model, ids)
    return ids


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("chunk", [None, 50])
def test_answers_are_those_of_a_fresh_prefill(model, prompt, tmp_path, system, chunk):
    ids, question = saved(model, prompt, tmp_path / "doc.kv", chunk), [5, 6, 7]
    options = {"alpha": 0.3} | ({"drive": tmp_path} if ALL[system].needs_drive else {})
    with hillinfer.make_cache(model, system, **options) as cache:
        feed(model, cache, ids, chunk)
        want = answer(model, cache, ids, question)
    for _ in range(2):  # opening changes nothing
        cache, back = open_session(tmp_path / "doc.kv", model, system, **options)
        with cache:
            assert back == ids
            assert answer(model, cache, back, question) == want
    assert [path.name for path in tmp_path.iterdir()] == ["doc.kv"]
    assert (tmp_path / "doc.kv").stat().st_mode & 0o777 == 0o600


def test_what_a_drive_holds_is_saved_too_and_a_crop_with_it(model, prompt, tmp_path):
    ids = prompt[0].tolist()
    with hillinfer.make_cache(model, "hillinfer", drive=tmp_path, alpha=0.2) as cache:
        feed(model, cache, ids, 40)
        cache.crop(-25)
        save_session(cache, tmp_path / "doc.kv", model, ids[:-25])
        want = [(layer.layer.store.all()[0].clone(), layer.layer.pieces) for layer in cache.layers]
    cache, back = open_session(tmp_path / "doc.kv", model, "full")
    with cache:
        assert back == ids[:-25]
        for layer, (records, pieces) in zip(cache.layers, want, strict=True):
            assert torch.equal(layer.layer.store.all()[0], records)
            assert layer.layer.pieces == pieces


def test_a_session_opens_in_another_process(model, prompt, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ids = saved(model, prompt, tmp_path / "doc.kv")
    with hillinfer.make_cache(model, "topk", alpha=0.3) as cache:
        feed(model, cache, ids)
        want = answer(model, cache, ids, [5, 6, 7])
    code = (
        "import sys, json, torch, hillinfer; from transformers import AutoModelForCausalLM as M; "
        "from tests.test_session import answer; m = M.from_pretrained(sys.argv[1], dtype=torch.float32).eval(); "
        "c, ids = hillinfer.open_session(sys.argv[2], m, 'topk', alpha=0.3); print(answer(m, c, ids, [5, 6, 7]))"
    )
    command = [sys.executable, "-c", code, tmp_path / "model", tmp_path / "doc.kv"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.splitlines()[-1]) == want


def test_one_line_keeps_a_document(model, models, prompt, tmp_path):
    """The first call prefills and saves, the later ones open: the answers are the same, another document is refused."""
    path, ids = tmp_path / "doc.kv", prompt[0].tolist()
    answers = []
    for _ in range(2):
        with hillinfer.keep_session(path, model, ids, "topk", alpha=0.3, chunk=60) as cache:
            answers.append(answer(model, cache, ids, [5, 6, 7]))
    assert answers[0] == answers[1]
    before = path.read_bytes()
    with pytest.raises(UsageError, match="another document"):
        hillinfer.keep_session(path, model, ids[:-1], "topk")
    assert path.read_bytes() == before


class Adapted(torch.nn.Module):
    """A linear layer with adapters, laid out as peft does."""

    adapter_layer_names = ("lora_A",)
    disable_adapters = merged = False

    def __init__(self, base: torch.nn.Linear, **scaling: float):
        super().__init__()
        self.base_layer, self.scaling, self.active_adapters = base, scaling, list(scaling)
        self.lora_A = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in scaling})


class TestFingerprint:
    """It changes with what makes KV, and with nothing else."""

    @pytest.mark.parametrize(
        "field, value",
        [("pad_token_id", 3), ("eos_token_id", [1, 3]), ("use_cache", False), ("output_hidden_states", True),
         ("a_field_of_a_later_release", 1), ("attention_dropout", 0.1), ("id2label", {0: "a"})],
    )  # fmt: skip
    def test_fields_without_effect(self, model, field, value):
        other = copy.deepcopy(model)
        setattr(other.config, field, value)
        assert fingerprint(other) == fingerprint(model)

    def test_fields_that_shape_kv(self, model):
        other = copy.deepcopy(model)
        for field, value in (("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}), ("rms_norm_eps", 0.1)):
            before = fingerprint(other)
            setattr(other.config, field, value)
            assert fingerprint(other) != before

    def test_compiled_parts(self, model):
        other = copy.deepcopy(model)
        other.model.layers[0] = torch.compile(other.model.layers[0], backend="eager")
        assert fingerprint(other) == fingerprint(model)

    def test_adapters_that_are_on(self, model):
        other = copy.deepcopy(model)
        part = other.model.layers[0].self_attn
        part.q_proj = Adapted(part.q_proj, one=1.0, two=2.0)
        seen = [fingerprint(model)]
        for on in (["one"], ["two"], ["one", "two"]):
            part.q_proj.active_adapters = on
            seen.append(fingerprint(other))
        part.q_proj.scaling["two"] = 3.0
        seen.append(fingerprint(other))
        assert len(set(seen)) == len(seen)
        part.q_proj.disable_adapters = True
        assert fingerprint(other) == seen[0]

    def test_weights_that_are_not_in_memory_are_refused_before_the_prefill(self, model, prompt, tmp_path):
        other = copy.deepcopy(model).to("meta")
        with pytest.raises(UsageError, match="without offloading"):
            hillinfer.keep_session(tmp_path / "doc.kv", other, prompt[0].tolist(), "topk")


def test_a_model_within_a_wrapper_keeps_and_opens_sessions(model, prompt, tmp_path):
    ids = prompt[0].tolist()
    hillinfer.keep_session(tmp_path / "doc.kv", torch.compile(model, backend="eager"), ids, "topk").close()
    open_session(tmp_path / "doc.kv", torch.nn.DataParallel(model), "topk")[0].close()


def test_another_tokenizer_is_refused(model, prompt, tmp_path):
    class Tokenizer:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    ids = prompt[0].tolist()
    hillinfer.keep_session(tmp_path / "doc.kv", model, ids, "full", Tokenizer("a", "b")).close()
    open_session(tmp_path / "doc.kv", model, "full", Tokenizer("a", "b"))[0].close()
    with pytest.raises(UsageError, match="another tokenizer"):
        open_session(tmp_path / "doc.kv", model, "full", Tokenizer("b", "a"))


def test_a_file_that_is_cut_short_while_it_is_open_is_an_error_and_no_signal(tmp_path):
    from hillinfer.session_file import save

    records = torch.randn(2, 1, 300, 2, 1, 4)
    save(tmp_path / "x.kv", [[r] for r in records], tuple(records.shape), records.dtype, {})
    file = Saved(tmp_path / "x.kv")
    os.truncate(tmp_path / "x.kv", 5000)
    with pytest.raises(UsageError, match="was truncated"):
        file.read(1, 0, 300)


class TestRefused:
    @pytest.mark.parametrize("system", [name for name in ALL if name not in SYSTEMS])
    def test_systems_that_need_the_prompts_queries(self, model, prompt, tmp_path, system):
        saved(model, prompt, tmp_path / "doc.kv")
        with pytest.raises(UsageError, match="prefill again"):
            open_session(tmp_path / "doc.kv", model, system, drive=tmp_path)

    def test_systems_and_models_that_no_session_serves_before_the_prefill(self, models, prompt, tmp_path):
        for model, system in ((models("llama"), "h2o"), (models("qwen2-mixed"), "topk")):
            passes = []
            hook = model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
            with hook, pytest.raises(UsageError, match="prefill again"):
                hillinfer.keep_session(tmp_path / "doc.kv", model, prompt[0].tolist(), system)
            assert not passes and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("config", [FalconH1Config, Zamba2Config])
    def test_layers_that_keep_more_than_keys_and_values(self, config):
        with pytest.raises(UsageError, match=r"a window or a state|cache class of its own"):
            check_keeps(config(), "full", {})

    @pytest.mark.parametrize("document", [[], torch.ones(1, 5).long(), [[5, 6]], "text", None, [5, -1], [5, 97], [0.5]])
    def test_documents_that_are_no_token_ids(self, model, tmp_path, document):
        with pytest.raises(UsageError, match="document"):
            hillinfer.keep_session(tmp_path / "doc.kv", model, document, "topk")

    def test_another_models(self, model, models, prompt, tmp_path):
        saved(model, prompt, tmp_path / "doc.kv")
        with pytest.raises(UsageError, match="another model"):
            open_session(tmp_path / "doc.kv", models("qwen2"), "full")

    def test_any_flipped_bit_of_the_records(self, model, prompt, tmp_path):
        path = tmp_path / "doc.kv"
        saved(model, prompt, path)
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for at in torch.randint(start, len(whole), (40,), generator=torch.Generator().manual_seed(0)).tolist():
            bad = bytearray(whole)
            bad[at] ^= 1 << at % 8
            path.write_bytes(bad)
            with pytest.raises(UsageError, match=r"damaged: layer \d+, tokens"):
                open_session(path, model, "full")

    def test_a_header_in_which_anything_differs(self, model, prompt, tmp_path):
        path = tmp_path / "doc.kv"
        ids = saved(model, prompt, path)
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for at in torch.randint(0, start, (200,), generator=torch.Generator().manual_seed(0)).tolist():
            bad = bytearray(whole)
            bad[at] ^= 1 << at % 7
            path.write_bytes(bad)
            try:
                cache, back = open_session(path, model, "full")
            except UsageError:
                continue
            assert back == ids and whole[at : at + 1] == b" ", "only a blank may differ"
            cache.close()

    @pytest.mark.parametrize("cut", [0, 7, 100, -1, -5000])
    def test_a_truncated_file(self, model, prompt, tmp_path, cut):
        path = tmp_path / "doc.kv"
        saved(model, prompt, path)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UsageError, match="not a complete session"):
            open_session(path, model, "full")

    def test_files_of_others(self, model, prompt, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match="not a complete session"):
            saved(model, prompt, tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == "mine"
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match="link"):  # neither followed to be read
            open_session(tmp_path / "link", model, "full")
        with pytest.raises(UsageError, match="link"):
            saved(model, prompt, tmp_path / "link")
        for special in (tmp_path, "/dev/null"):
            with pytest.raises(UsageError):
                open_session(special, model, "full")
        with pytest.raises(UsageError, match=r"folder .*none does not exist"):
            saved(model, prompt, tmp_path / "none" / "doc.kv")

    def test_a_batch_and_a_wrong_count(self, model, prompt, tmp_path):
        with hillinfer.make_cache(model, "full") as cache:
            feed(model, cache, prompt[0].tolist())
            with pytest.raises(UsageError, match="token ids"):
                save_session(cache, tmp_path / "doc.kv", model, [1, 2])
        assert not list(tmp_path.iterdir())


def test_a_killed_save_leaves_the_old_session_and_is_cleared_away(model, prompt, tmp_path):
    path = tmp_path / "doc.kv"
    ids = saved(model, prompt, path)
    (tmp_path / ".doc.kv-abcdefgh.part").write_bytes(b"half")
    (tmp_path / ".other.kv-abcdefgh.part").write_bytes(b"not ours")
    assert open_session(path, model, "full")[1] == ids
    saved(model, prompt, path)
    assert {p.name for p in tmp_path.iterdir()} == {"doc.kv", ".other.kv-abcdefgh.part"}


def test_parts_are_checked_one_by_one(tmp_path):
    from hillinfer.session_file import save

    records = torch.randn(2, 1, 2 * PART + 5, 2, 1, 4)
    save(tmp_path / "x.kv", [[r[:, :7], r[:, 7:]] for r in records], tuple(records.shape), records.dtype, {})
    file = Saved(tmp_path / "x.kv")
    for start, end in ((0, 5), (PART - 3, PART + 3), (0, 2 * PART + 5), (2 * PART + 4, 2 * PART + 5)):
        assert torch.equal(file.read(1, start, end), records[1][:, start:end])
