"""A prompt opened from a store is answered as after a prefill, whatever the store lacks or has lost."""

import copy
import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig
from typer.testing import CliRunner

import hillinfer
from hillinfer import UsageError
from hillinfer.commands.app import app
from hillinfer.fingerprint import fingerprint
from hillinfer.longbench.runner import feed
from hillinfer.prefix_store import lending, writing
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.reading import check
from hillinfer.session_file import save
from hillinfer.tiers.engines import Threads
from tests.conftest import SHAPE, seeded

ALL = hillinfer.list_systems()
SYSTEMS = [name for name, found in ALL.items() if found.policy.late]
BLOCK, TOKENS = 32, 200  # 6 whole blocks and a rest
WHOLE = TOKENS // BLOCK * BLOCK


@pytest.fixture
def model(models):
    return models("llama")


@pytest.fixture
def store(tmp_path):
    return PrefixStore(tmp_path / "store", block=BLOCK)


@pytest.fixture
def ids():
    return torch.randint(2, 97, (1, TOKENS), generator=torch.Generator().manual_seed(3))[0].tolist()


def generate(model, cache, ids: list[int], new: int = 8, **options) -> list[int]:
    whole = torch.tensor([ids])
    mask = torch.ones_like(whole)
    out = model.generate(
        whole, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False, **options
    )
    return out[0, len(ids) :].tolist()


def fresh(model, ids: list[int], **options) -> list[int]:
    """The answer without a store."""
    with hillinfer.make_cache(model, "full") as cache:
        return generate(model, cache, ids, **options)


def stored(model, store, ids: list[int], system: str = "full", **options):
    """An answer with the store, where its prompt came from, and the blocks that were kept."""
    with hillinfer.make_cache(model, system, store, **options) as cache:
        answer = generate(model, cache, ids)
        return answer, cache.run.keeper.report, cache.run.keeper.settle()


def state(cache) -> list:
    """All that a prefill leaves in a cache: pieces; records and key codes."""
    found = []
    for layer in cache.tiered:
        coded = [layer.codes.codes.view(), layer.codes.scale, layer.codes.zero] if layer.codes else []
        found.append(([*layer.pieces], [part.clone() for part in (torch.cat([*layer.records()], 1), *coded)]))
    return found


@contextmanager
def warned_once(text: str):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    assert [str(one.message) for one in seen if text in str(one.message)][1:] == [], "more than once"
    assert any(text in str(one.message) for one in seen), [str(one.message) for one in seen]


class TestEqualsAPrefill:
    @pytest.mark.parametrize("system", SYSTEMS)
    @pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
    def test_to_the_bit(self, models, store, ids, tmp_path, family, system):
        """In every system, all that a prefill of the same two pieces leaves, and so the same answer."""
        model = models(family)
        options = {"alpha": 0.3} | ({"drive": tmp_path} if ALL[system].needs_drive else {})
        with hillinfer.make_cache(model, "topk", store) as cache:
            feed(model, cache, ids[:WHOLE])
        with hillinfer.make_cache(model, system, **options) as cache:
            for part in (ids[:WHOLE], ids[WHOLE:]):
                feed(model, cache, part)
            want, tokens = state(cache), generate(model, cache, [*ids, 5])
        with hillinfer.make_cache(model, system, store, **options) as cache:
            feed(model, cache, ids)
            assert cache.run.keeper.report.opened == WHOLE
            for (pieces, parts), (own_pieces, own) in zip(want, state(cache), strict=True):
                assert pieces == own_pieces
                assert all(torch.equal(a, b) for a, b in zip(parts, own, strict=True))
            assert generate(model, cache, [*ids, 5]) == tokens

    @pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "opt", "qwen3"])
    def test_the_answer_of_plain_generate(self, models, store, ids, family):
        model = models(family)
        want = fresh(model, ids)
        answers, reports, kept = zip(*(stored(model, store, ids) for _ in range(3)), strict=True)
        assert answers == (want,) * 3
        assert [report.opened for report in reports] == [0, WHOLE, WHOLE] and list(kept) == [6, 0, 0]
        assert reports[1].nbytes == sum(
            layer.layer.store.all()[0][:, :WHOLE].nbytes for layer in prefilled(model, ids).layers
        )

    def test_latents_and_other_exact_families(self, store, ids):
        from benchmarks.tiny_models import build

        model = build("deepseek_v3")
        assert [stored(model, store, ids)[0] for _ in range(2)] == [fresh(model, ids)] * 2
        assert stored(model, store, ids)[1].opened == WHOLE

    def test_a_shared_half_another_question_and_the_next_turn(self, model, store, ids):
        stored(model, store, ids)
        other = ids[: TOKENS // 2] + ids[::-1]
        asked = ids + [7, 8, 9]
        said = asked + stored(model, store, asked)[0] + [4, 5, 6] * 20
        for prompt, opened in ((other, TOKENS // 2 // BLOCK * BLOCK), (asked, WHOLE), (said, WHOLE), (said, 256)):
            answer, report, _ = stored(model, store, prompt)
            assert (answer, report.opened) == (fresh(model, prompt), opened)

    def test_at_least_two_tokens_are_computed(self, model, store, ids):
        """A single one would be a decode step, and attend to a selection."""
        stored(model, store, ids)
        for n in (WHOLE, WHOLE + 1, WHOLE + 2):
            answer, report, _ = stored(model, store, ids[:n], "topk", alpha=0.2)
            assert report.opened == (WHOLE if n == WHOLE + 2 else WHOLE - BLOCK)
            with hillinfer.make_cache(model, "topk", alpha=0.2) as cache:
                feed(model, cache, ids[: report.opened])
                assert generate(model, cache, ids[:n]) == answer

    def test_exact_decoding(self, model, store, ids):
        """Its verified tokens are kept as well: their KV is that of a prefill."""
        want = fresh(model, ids, new=60)
        for opened in (0, WHOLE):
            with hillinfer.make_cache(model, "topk", store, alpha=0.2) as cache:
                assert generate(model, cache, ids, 60, custom_generate=hillinfer.exact) == want
                assert cache.run.keeper.report.opened == opened
        assert stored(model, store, ids + want)[1].opened >= WHOLE

    @pytest.mark.parametrize("system", [name for name in ALL if name not in SYSTEMS])
    def test_systems_that_need_the_prompts_queries_prefill_and_keep(self, model, store, ids, system):
        with hillinfer.make_cache(model, system, alpha=0.3) as cache:
            want = generate(model, cache, ids)
        for kept in (6, 0):
            with warned_once("queries, which no store keeps"):
                answer, report, new = stored(model, store, ids, system, alpha=0.3)
            assert (answer, report.opened, new) == (want, 0, kept)

    @pytest.mark.parametrize("option, part", [("prompt_lookup_num_tokens", WHOLE), ("prefill_chunk_size", 64)])
    def test_other_ways_to_generate(self, model, store, ids, option, part):
        want, options = fresh(model, ids), {option: 3 if part == WHOLE else 70}
        for opened in (0, part):
            with hillinfer.make_cache(model, "full", store) as cache:
                assert generate(model, cache, ids, **options) == want
                assert cache.run.keeper.report.opened == opened

    def test_opened_ahead_of_chunks_and_a_next_turn_in_the_same_cache(self, model, store, ids):
        """A chunk asks for its own tokens only; `open` asks for all."""
        want = stored(model, store, ids)[0]
        with hillinfer.make_cache(model, "full", store) as cache:
            assert cache.run.keeper.open(ids) == WHOLE
            assert generate(model, cache, ids, prefill_chunk_size=70) == want
            longer = ids + want + [5, 6, 7] * 20  # the next turn, in the same cache
            assert generate(model, cache, longer) == fresh(model, longer)

    def test_a_model_in_a_wrapper(self, model, store, ids):
        wrapped = torch.compile(model, backend="eager")
        assert [stored(wrapped, store, ids)[0] for _ in range(2)] == [fresh(model, ids)] * 2


def prefilled(model, ids: list[int]):
    cache = hillinfer.make_cache(model, "full")
    feed(model, cache, ids)
    return cache


class TestLending:
    """A cache on a drive reads stored blocks where they lie, and never writes to them."""

    @staticmethod
    @contextmanager
    def opened(model, store, ids, drive, system="hillinfer", **options):
        with hillinfer.make_cache(model, system, store, drive=drive, alpha=0.3, **options) as cache:
            feed(model, cache, ids)
            assert cache.run.keeper.report.opened == WHOLE
            yield cache

    @pytest.fixture
    def kept(self, model, store, ids):
        stored(model, store, ids)
        return {block.path: block.path.read_bytes() for block in store.blocks()}

    @pytest.mark.parametrize("engine", ["auto", "threads"])
    @pytest.mark.parametrize("system", ["hillinfer", "lru", "leoam"])
    def test_nothing_is_copied(self, model, store, ids, tmp_path, kept, system, engine):
        options = dict(engine=engine, compress=0) if system == "leoam" else dict(engine=engine)
        with self.opened(model, store, ids, tmp_path, system, **options) as cache:
            written = [span for span in cache.timeline.spans if (span.lane, span.kind) == ("drive", "write")]
            assert (cache.run.lent.capacity, written) == (WHOLE, [])
            generate(model, cache, [*ids, 5], 80)  # so that its own file is written to
            assert any(span.lane == "drive" and span.kind != "write" for span in cache.timeline.spans)
        assert {path: path.read_bytes() for path in kept} == kept

    def test_what_is_not_lent(self, model, store, ids, tmp_path, kept):
        for system, options in (("dualblade", {}), ("instattention", {}), ("leoam", {"compress": 0.5})):
            with self.opened(model, store, ids, tmp_path, system, **options) as cache:
                assert cache.run.lent is None

    def test_two_caches_and_an_eviction(self, model, store, ids, tmp_path, kept):
        with self.opened(model, store, ids, tmp_path) as alone:
            want = generate(model, alone, [*ids, 5])
        with self.opened(model, store, ids, tmp_path) as one, self.opened(model, store, ids, tmp_path) as other:
            assert store.prune(0) == 0
            assert [generate(model, cache, [*ids, 5]) for cache in (one, other)] == [want] * 2

    @pytest.mark.parametrize("left", [WHOLE, WHOLE - 1, BLOCK + 3, 3])
    def test_cropped_into_what_was_lent(self, model, store, ids, tmp_path, kept, left):
        """What is left moves to the cache's own file, and a new prompt goes on from there."""
        other = [*ids[:left], *ids[::-1]]
        with hillinfer.make_cache(model, "hillinfer", drive=tmp_path, alpha=0.3) as cache:
            for part in (ids[:WHOLE], ids[WHOLE:]):
                feed(model, cache, part)
            cache.crop(left)
            want = generate(model, cache, other, 80)
        with self.opened(model, store, ids, tmp_path) as cache:
            cache.crop(left)
            assert generate(model, cache, other, 80) == want
            assert all((log.lent is None) == (left < WHOLE) for layer in cache.tiered for log in layer.store.logs)
        assert {path: path.read_bytes() for path in kept} == kept

    def test_cropped_to_nothing_the_next_prompt_is_copied(self, model, store, ids, tmp_path, kept):
        with self.opened(model, store, ids, tmp_path) as cache:
            want, lent = generate(model, cache, [*ids, 5]), cache.run.lent
            cache.crop(-cache.get_seq_length())
            feed(model, cache, ids)
            assert cache.run.keeper.report.opened == WHOLE and cache.run.lent is lent
            assert generate(model, cache, [*ids, 5]) == want

    def test_damage_after_opening(self, model, store, ids, tmp_path, kept):
        """A block's checksums are in memory from its opening on, so that a later read that differs names its place."""
        with self.opened(model, store, ids, tmp_path) as cache:
            for path, data in kept.items():
                path.write_bytes(data[:4096] + bytes(len(data) - 4096))
            with pytest.raises(hillinfer.DriveError, match=r"layer 0, sequence 0, position .* is not what was written"):
                cache.tiered[0].store.all()

    def test_a_block_that_cannot_be_read(self, model, store, ids, tmp_path, kept, monkeypatch):
        """It is computed again, and so are those after it."""

        bad = sorted(kept)[3]

        class Bad(Threads):
            def transfer(self, write, fd, offsets, *rest, **options) -> None:
                if bad in {Path(f"/proc/self/fd/{number}").readlink() for number in fd.tolist()}:
                    error = OSError(errno.EIO, os.strerror(errno.EIO))
                    error.offset = int(offsets[0])
                    raise error
                super().transfer(write, fd, offsets, *rest, **options)

        monkeypatch.setattr(lending, "open_engine", lambda name, threads: Bad(2))
        with warned_once("cannot be used and is computed again"):
            answer, report, _ = stored(model, store, ids, "hillinfer", alpha=0.3, drive=tmp_path)
        assert report.opened == 3 * BLOCK and "Input/output error" in report.why
        with hillinfer.make_cache(model, "hillinfer", drive=tmp_path, alpha=0.3) as cache:
            feed(model, cache, ids[: 3 * BLOCK])
            assert generate(model, cache, ids) == answer

    def test_too_many_open_files(self, model, store, ids, kept):
        """No reason to think a block damaged."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with hillinfer.make_cache(model, "full", store) as cache:
            taken = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
            third = [number for number in range(soft) if number not in taken][2]
            resource.setrlimit(resource.RLIMIT_NOFILE, (third, hard))  # two more can be opened
            try:
                assert cache.run.keeper.open(ids) == 0
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert "Too many open files" in cache.run.keeper.report.why
        assert {block.path for block in store.blocks()} == set(kept)


class TestKept:
    @pytest.mark.parametrize("chunk", [None, 50, 32, 90])
    def test_a_chunked_prefill(self, model, store, ids, chunk):
        """Blocks that lie across chunks are kept too, and hold what the cache holds."""
        with hillinfer.make_cache(model, "topk", store) as cache:
            feed(model, cache, ids, chunk)
            assert cache.run.keeper.settle() == 6
            want = [torch.cat([*layer.records()], 1) for layer in cache.tiered]
        with hillinfer.make_cache(model, "full", store) as cache:
            assert cache.run.keeper.open(ids) == WHOLE
            for layer, records in zip(cache.tiered, want, strict=True):
                assert torch.equal(torch.cat([*layer.records()], 1), records[:, :WHOLE])

    def test_a_chunk_that_is_opened_in_part(self, model, store, ids):
        stored(model, store, ids)
        with hillinfer.make_cache(model, "full", store) as cache:
            feed(model, cache, ids[:150], 100)
            assert cache.run.keeper.report.opened == 96
            assert generate(model, cache, ids) == fresh(model, ids)

    def test_no_decoded_token(self, model, store, ids):
        """Their KV depends on what the system selected."""
        with hillinfer.make_cache(model, "topk", store, alpha=0.2) as cache:
            answer = generate(model, cache, ids, 100)
            feed(model, cache, [5] * 50)  # an exact pass, but over those
            assert cache.run.keeper.settle() == 6
            cache.crop(TOKENS - cache.get_seq_length())
            feed(model, cache, [5] * 50)  # and over the prompt alone
            assert cache.run.keeper.settle() == 7
        assert stored(model, store, ids + [5] * 50)[1].opened == 224
        assert stored(model, store, ids + answer)[1].opened == WHOLE

    def test_a_pass_that_fails_keeps_nothing_wrong(self, model, store, ids):
        with hillinfer.make_cache(model, "full", store) as cache:
            hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
            with hook, pytest.raises(ZeroDivisionError):
                feed(model, cache, ids)
            assert cache.run.keeper.settle() == 0
            cache.reset()
            feed(model, cache, ids[::-1])
        assert [path.name for path in store.folder.iterdir() if path.suffix != ".kv"] == [".lock"]
        assert stored(model, store, ids)[:2][0] == fresh(model, ids)
        assert stored(model, store, ids[::-1])[1].opened == WHOLE

    def test_a_copy_a_reset_and_a_closed_cache(self, model, store, ids):
        with hillinfer.make_cache(model, "full", store) as cache:
            feed(model, cache, ids)
            twin = copy.deepcopy(cache)
            assert twin.run.keeper is None
            assert generate(model, twin, [*ids, 5]) == fresh(model, [*ids, 5])
            cache.run.keeper.settle()
            cache.reset()
            feed(model, cache, ids)
            assert cache.run.keeper.report.opened == WHOLE
        assert not model._forward_pre_hooks and not model._forward_hooks
        cache = hillinfer.make_cache(model, "full", store)
        del cache
        gc.collect()
        assert not model._forward_pre_hooks


class TestNotUsed:
    """Passes whose KV or output is more than one prompt's: an ordinary prefill, with the reason."""

    def test_logits_of_all_positions(self, model, store, ids):
        stored(model, store, ids)
        with hillinfer.make_cache(model, "full", store) as cache:
            with torch.no_grad():
                assert model(torch.tensor([ids]), past_key_values=cache).logits.shape[1] == TOKENS
            assert "were asked for" in cache.run.keeper.report.why
        for options in ({"output_hidden_states": True}, {"output_attentions": True}):
            with hillinfer.make_cache(model, "full", store) as cache:
                feed_one = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1, **options)
                assert len(feed_one.logits) == 1 and cache.run.keeper.report.opened == 0

    def test_more_logits_than_the_rest_has_tokens(self, model, store, ids):
        stored(model, store, ids)
        with hillinfer.make_cache(model, "full", store) as cache, torch.no_grad():
            own = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=50).logits
            assert cache.run.keeper.report.opened == 128
        torch.testing.assert_close(own, model(torch.tensor([ids]), logits_to_keep=50).logits)

    @pytest.mark.parametrize("padded", [False, True])
    def test_batches_and_padding(self, model, store, ids, padded):
        stored(model, store, ids)
        rows = torch.tensor([[0] * 5 + ids] if padded else [ids, ids])
        options = dict(attention_mask=(rows > 0).long(), max_new_tokens=8, do_sample=False)
        with hillinfer.make_cache(model, "full", store) as cache:
            with warned_once("the store is not used"):
                out = model.generate(rows, past_key_values=cache, **options)
            assert cache.run.keeper.report.opened == 0
        assert out[:, rows.shape[1] :].tolist() == [fresh(model, ids)] * len(rows)

    def test_inputs_beside_token_ids_are_neither_opened_nor_kept(self, model, store, ids):
        embedded = model.get_input_embeddings()(torch.tensor([ids])).detach()
        with hillinfer.make_cache(model, "full", store) as cache:
            with torch.no_grad(), warned_once("the store is not used"):
                model(inputs_embeds=embedded, past_key_values=cache, logits_to_keep=1)
            assert cache.run.keeper.settle() == 0

    def test_refused(self, models, store):
        dynamic = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        for model, text in (
            (models("qwen2-mixed"), "a window or a state"),
            (seeded(lambda: LlamaForCausalLM(dynamic)), "length of the prompt"),
            (copy.deepcopy(models("llama")).to("meta"), "without offloading"),
            (models("llama").config, "not its config"),
        ):
            with pytest.raises(UsageError, match=text):
                hillinfer.make_cache(model, "full", store)
            assert isinstance(model, PretrainedConfig) or not model._forward_pre_hooks
        with pytest.raises(UsageError, match="another folder"):
            PrefixStore("/dev/null/store")


class TestLostAndDamaged:
    """A clear line, and the answer of a prefill."""

    def damaged(self, model, store, ids, text: str, opened: int):
        with warned_once(text):
            answer, report, _ = stored(model, store, ids)
        assert (answer, report.opened) == (fresh(model, ids), opened)
        answer, report, _ = stored(model, store, ids)  # healed
        assert (answer, report.opened) == (fresh(model, ids), WHOLE)

    @pytest.mark.parametrize("cut", [0, 7, 100, -1, -5000])
    def test_truncated(self, model, store, ids, cut):
        stored(model, store, ids)
        path = store.blocks()[2].path
        path.write_bytes(path.read_bytes()[:cut])
        self.damaged(model, store, ids, "not a complete session", 2 * BLOCK)

    def test_any_flipped_bit(self, model, store, ids):
        stored(model, store, ids)
        path = store.blocks()[3].path
        whole, rng = path.read_bytes(), torch.Generator().manual_seed(0)
        for at in torch.randint(0, len(whole), (40,), generator=rng).tolist():
            bad = bytearray(whole)
            bad[at] ^= 1 << at % 8
            path.write_bytes(bad)
            assert check(path) or (at < 8 + int.from_bytes(whole[:8], "little") and whole[at : at + 1] == b" ")
        self.damaged(model, store, ids, "cannot be used and is computed again", 3 * BLOCK)

    def test_a_block_under_anothers_name_and_a_link(self, model, store, ids, tmp_path):
        stored(model, store, ids)
        first, second, third, *_, last = (block.path for block in store.blocks())
        second.write_bytes(first.read_bytes())
        self.damaged(model, store, ids, "another block", BLOCK)
        save(third, [[torch.zeros(1, BLOCK, 2, 2, 16)]], (1, 1, BLOCK, 2, 2, 16), torch.float32, {"block": third.stem})
        self.damaged(model, store, ids, "another shape", 2 * BLOCK)
        (tmp_path / "elsewhere").write_bytes(last.read_bytes())
        last.unlink()
        last.symlink_to(tmp_path / "elsewhere")
        self.damaged(model, store, ids, "is a link", WHOLE - BLOCK)
        assert not last.is_symlink() and (tmp_path / "elsewhere").exists()

    def test_a_folder_that_was_deleted(self, model, store, ids):
        with hillinfer.make_cache(model, "full", store) as cache:
            shutil.rmtree(store.folder)
            with warned_once("No such file"):
                assert generate(model, cache, ids) == fresh(model, ids)
                assert cache.run.keeper.settle() == 0

    def test_a_missing_block(self, model, store, ids):
        stored(model, store, ids)
        store.blocks()[1].path.unlink()
        answer, report, kept = stored(model, store, ids)
        assert (answer, report.opened, kept) == (fresh(model, ids), BLOCK, 1)
        assert stored(model, store, ids)[1].opened == WHOLE

    def test_another_model_and_dtype(self, model, models, store, ids):
        stored(model, store, ids)
        for other in (models("qwen2"), copy.deepcopy(model).bfloat16()):
            answer, report, kept = stored(other, store, ids)
            assert (answer, report.opened, kept) == (fresh(other, ids), 0, 6)
            assert "no block of this model in this precision" in report.why
        assert len(store.blocks()) == 18
        assert "tokens 0 to 31" in stored(model, store, ids[::-1])[1].why
        assert "a block of 32" in stored(model, store, ids[:20])[1].why

    def test_weights_that_change_between_two_prompts(self, model, store, ids):
        other = copy.deepcopy(model)
        with hillinfer.make_cache(other, "full", store) as cache:
            feed(other, cache, ids)
            cache.run.keeper.settle()
            cache.reset()
            with torch.no_grad():
                other.model.layers[0].self_attn.k_proj.weight *= 1.1
            feed(other, cache, ids)
            assert cache.run.keeper.report.opened == 0

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
    def test_a_full_and_a_read_only_disk(self, model, store, ids, monkeypatch, code):
        """Full at the second layer; read-only from the start, where blocks are opened nevertheless."""
        stored(model, store, ids[:100])

        def fail(*args, **options):
            raise OSError(code, os.strerror(code))

        if code == errno.ENOSPC:
            monkeypatch.setattr(writing.Draft, "_write", lambda own, data, at: fail() if own.left < 3 else None)
        else:
            monkeypatch.setattr(writing.files, "scratch", fail)
            monkeypatch.setattr("os.utime", fail)
        with warned_once(os.strerror(code)):
            answer, report, kept = stored(model, store, ids)
        assert (answer, report.opened, kept) == (fresh(model, ids), 96, 0)
        assert not list(store.folder.glob(".block-*"))


class TestQuota:
    def test_smaller_than_a_block(self, model, tmp_path, ids):
        store = PrefixStore(tmp_path / "store", "1KiB", BLOCK)
        with warned_once("leaves room for 0 of 6 blocks"):
            answer, _, kept = stored(model, store, ids)
        assert (answer, kept, store.blocks()) == (fresh(model, ids), 0, [])

    def test_the_least_recently_used_leaves_go_first(self, model, tmp_path, ids):
        store = PrefixStore(tmp_path / "store", block=BLOCK)
        prompts = [ids, ids[::-1], ids[50:] + ids[:50]]
        for prompt in prompts[:2]:
            stored(model, store, prompt)
        size = store.blocks()[0].nbytes
        store.quota = 15 * size + size // 2
        stored(model, store, prompts[0][:100])  # used again: half of it now is the newest
        stored(model, store, prompts[2])
        assert sum(block.nbytes for block in store.blocks()) == 15 * size
        root = store.root(fingerprint(model), model.dtype)
        assert [len(store.known(store.chain(root, prompt))) for prompt in prompts] == [3, 6, 6]

    def test_a_prompt_larger_than_the_quota_keeps_its_beginning(self, model, tmp_path, ids):
        store = PrefixStore(tmp_path / "store", block=BLOCK)
        stored(model, store, ids[:40])
        store.quota = 4 * store.blocks()[0].nbytes
        with warned_once("leaves room for 3 of 5 blocks"):
            stored(model, store, ids)
        assert stored(model, store, ids)[1].opened == 4 * BLOCK

    def test_a_clock_set_back(self, model, store, ids):
        stored(model, store, ids)
        for block in store.blocks():
            os.utime(block.path, (9e9, 9e9))
        assert stored(model, store, ids)[:2][0] == fresh(model, ids)
        store.prune(3 * store.blocks()[0].nbytes)
        assert stored(model, store, ids)[1].opened == 3 * BLOCK


class TestSeveral:
    def run(self, jobs: list) -> None:
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def test_ten_readers_and_two_writers_at_once(self, model, store, ids):
        """Each with a copy of the model: hooks of several caches share one model's passes."""
        want, found = fresh(model, ids), []
        for count in (2, 10):
            self.run([lambda: found.append(stored(copy.deepcopy(model), store, ids))] * count)
        assert [answer for answer, *_ in found] == [want] * 12
        assert [report.opened for _, report, _ in found[2:]] == [WHOLE] * 10
        assert len(store.blocks()) == 6 and not list(store.folder.glob(".block-*"))

    def test_two_caches_of_one_model_in_turns(self, model, store, ids):
        with (
            hillinfer.make_cache(model, "full", store) as one,
            hillinfer.make_cache(model, "full", store) as other,
        ):
            for cache, part in ((one, ids[:70]), (other, ids[::-1]), (one, ids[70:])):
                feed(model, cache, part)
            assert (one.run.keeper.settle(), other.run.keeper.settle()) == (6, 6)
        assert [stored(model, store, prompt)[0] for prompt in (ids, ids[::-1])] == [
            fresh(model, prompt) for prompt in (ids, ids[::-1])
        ]


def test_the_command_line(tmp_path):
    def run(*words) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == (2 if "error:" in done.output else 0), done.output
        return done.output

    text, folder = tmp_path / "text.txt", tmp_path / "kv"
    text.write_text("line a-b: REGISTER_CONTENT is <12345>\n" * 64, encoding="utf-8")
    words = ["run", "--model", "embedded", "--system", "topk", "--max-new-tokens", 2, "--store", folder]
    first, second, chunked = (run(*words, "--prompt-file", text, *more) for more in ((), (), ("--prefill-chunk", 200)))
    assert "0 of 576 prompt tokens" in first and "2 blocks were kept" in first
    assert "512 of 576" in second and "512 of 576" in chunked
    assert "llama float32" in run("store", "list", folder) and "512" in run("store", "list", folder)
    path = next(folder.glob("*.kv"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "1 blocks are whole, 1 were damaged" in run("store", "verify", folder)
    assert "0 remain" in run("store", "prune", folder)
    for wrong, fix in (
        ([*words, "--prompt", "a", "--session", tmp_path / "s.kv"], "--session or --store"),
        ([*words, "--prompt", "a", "--num-beams", 2], "--num-beams 1"),
        ([*words[:-1], text, "--prompt", "a"], "another folder"),
        (["store", "list", tmp_path / "none"], "there is no store"),
    ):
        assert fix in run(*wrong)


@pytest.mark.parametrize("kills", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_while_writing_reading_and_evicting(kills):
    """Forks, and so in a process of its own with a single thread."""
    command = [sys.executable, "-m", "benchmarks.store_processes", "--kills", str(kills)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
