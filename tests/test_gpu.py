"""The GPU's path on a stand-in (tests/fake_gpu): what is said, what goes wrong silently, what the host waits for."""

import copy
import inspect
import json
import textwrap
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    OPTConfig,
    Qwen2Config,
)

import hillinfer
from benchmarks import gpu as gpu_script
from benchmarks import gpu_speed
from benchmarks.gpu_speed import FEW
from hillinfer import attention
from hillinfer.evaluator import codes
from hillinfer.evaluator.policies.topk import TopK
from hillinfer.evaluator.policy import Step
from hillinfer.evaluator.ranks import head_ranks
from hillinfer.longbench import sweep
from hillinfer.models import away, crossing
from hillinfer.models.device_codes import DeviceCodes
from hillinfer.models.rows import as_batch
from hillinfer.systems.baselines import quest
from hillinfer.systems.lossless import slots
from hillinfer.systems.registry import list_systems
from hillinfer.tiers import store
from hillinfer.tiers.geometry import Geometry
from hillinfer.whatif.rules import LAUNCHES
from hillinfer.workbench.observe import AttentionRecord
from tests.conftest import SHAPE, seeded
from tests.fake_gpu import DEVICE, FakeGpu, FakeGpuError, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

LAYERS, NEW = 3, 6  # of the tiny model; tokens to generate
ON_DRIVE = ("hillinfer", "lru", "leoam", "flexgen", "dualblade", "instattention")
PROMPT = torch.randint(2, 97, (2, 400), generator=torch.Generator().manual_seed(11))
MLA = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16)
OPT = dict(vocab_size=97, hidden_size=64, ffn_dim=96, word_embed_proj_dim=64, num_hidden_layers=3, pad_token_id=0)
FAMILY = {
    "qwen2_sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=24, max_window_layers=2),
    "opt": OPTConfig(**OPT, num_attention_heads=4, bos_token_id=1, eos_token_id=None),
    "gpt_oss": GptOssConfig(**SHAPE, head_dim=16, sliding_window=24, num_local_experts=2, num_experts_per_tok=1),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=24),
    "deepseek_v3": DeepseekV3Config(**SHAPE | MLA | {"num_key_value_heads": 4}, first_k_dense_replace=3),
}


@pytest.fixture
def gpu():
    with FakeGpu() as gpu:
        yield gpu
        assert not gpu.hazards


def options(system: str, folder) -> dict:
    """compress: LeoAM's automatic share depends on time."""
    return ({"drive": folder} if system in ON_DRIVE else {}) | ({"compress": 0.0} if system == "leoam" else {})


def placed(models, dtype=torch.float32, gpu: FakeGpu | None = None):
    """A copy of the tiny model, on the device if there is one."""
    model = copy.deepcopy(models("llama")).to(dtype)
    return gpu.take(model) if gpu else model


def say(model, system: str, batch=1, pad=0, n=150, inference=False, new=NEW, custom_generate=None, **how):
    """generate's tokens, on the host."""
    ids = PROMPT[:batch, :n].clone()
    ids[-1, :pad] = 0
    ids, mask = ids.to(model.device), (ids != 0).long().to(model.device)
    with torch.inference_mode(inference), torch.no_grad(), hillinfer.make_cache(model, system, **how) as cache:
        words = dict(max_new_tokens=new, do_sample=False, num_beams=1, custom_generate=custom_generate)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **words).cpu()


WAYS = {
    "one prompt": dict(),
    "two prompts, one padded, inference mode": dict(batch=2, pad=30, inference=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("system", list_systems())
def test_every_system_says_what_it_says_on_the_cpu(models, tmp_path, gpu, system, way):
    how = WAYS[way] | options(system, tmp_path)
    assert torch.equal(say(placed(models, gpu=gpu), system, **how), say(placed(models), system, **how))


def step(model, cache, start: int, end: int) -> torch.Tensor:
    return model(PROMPT[:1, start:end].to(model.device), past_key_values=cache).logits[:, -1]


def turns(model, system: str, **how) -> list[torch.Tensor]:
    """Logits of a chunked prefill, of decode steps, of another turn, and of more after a crop."""
    with torch.no_grad(), hillinfer.make_cache(model, system, **how) as cache:
        ends = [0, 200, 290, 291, 292, 330, 331]
        outs = [step(model, cache, *pair) for pair in pairwise(ends)]
        cache.crop(-80)
        outs += [step(model, cache, *pair) for pair in ((251, 252), (252, 270), (270, 271))]
        return [out.cpu() for out in outs]


def session(model, system: str, folder, **how) -> list[torch.Tensor]:
    path = folder / model.device.type
    hillinfer.keep_session(path, model, PROMPT[0, :200].tolist(), system, **how).close()
    cache, _ = hillinfer.open_session(path, model, system, **how)
    with torch.no_grad(), cache:
        return [step(model, cache, at, at + 1).cpu() for at in range(200, 203)]


def close(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("system", ["full", "topk", "h2o", "hillinfer", "leoam", "flexgen", "dualblade"])
def test_chunks_turns_and_crops(models, tmp_path, gpu, system):
    how = options(system, tmp_path)
    assert close(turns(placed(models, gpu=gpu), system, **how), turns(placed(models), system, **how))


@pytest.mark.parametrize("system", ["topk", "hillinfer", "leoam"])
def test_sessions(models, tmp_path, gpu, system):
    how = options(system, tmp_path) | {"folder": tmp_path}
    assert close(session(placed(models, gpu=gpu), system, **how), session(placed(models), system, **how))


@pytest.mark.parametrize("system", ["topk", "hillinfer", "leoam", "flexgen"])
def test_a_users_own_stream(models, tmp_path, gpu, system):
    """What threads look at must be ordered after it, wherever it was computed."""
    how = options(system, tmp_path) | dict(n=300)
    model = placed(models, gpu=gpu)
    with torch.cuda.Stream():
        out = say(model, system, **how)
    assert torch.equal(out, say(placed(models), system, **how))


@pytest.mark.parametrize("system", ["topk", "hillinfer", "leoam", "quest", "infinigen", "flexgen"])
def test_a_default_device_of_the_users(models, tmp_path, gpu, system):
    """torch.set_default_device("cuda"): what is for the host's kernels must not land on the device."""
    how = options(system, tmp_path)
    model = placed(models, gpu=gpu)
    with torch.device("cuda"):
        out = say(model, system, **how)
    assert torch.equal(out, say(placed(models), system, **how))


SELECTIVE = [name for name, system in list_systems().items() if system.policy.selects]


@pytest.mark.parametrize("system", [*SELECTIVE, "instattention"])
def test_bf16_as_on_the_cpu(models, tmp_path, monkeypatch, gpu, system):
    """Selection is the same, to the bit, wherever it runs. What is attended to on the host is, too; on a GPU attention
    is torch's, which is therefore taken on the CPU, in its plain form: sums in another order would change a token.
    """
    how = options(system, tmp_path) | dict(batch=2, pad=30)
    if system not in ON_DRIVE:
        monkeypatch.setattr(attention, "is_native", lambda query: False)
    with sdpa_kernel(SDPBackend.MATH):
        out = say(placed(models, torch.bfloat16, gpu), system, **how)
        assert torch.equal(out, say(placed(models, torch.bfloat16), system, **how))


@pytest.mark.parametrize("family", ["qwen2_sliding", "opt", "gpt_oss", "gemma2", "deepseek_v3"])
def test_other_families(tmp_path, gpu, family):
    """A sliding layer before a tiered one, heads without groups, attention sinks, a soft cap, latents."""
    model = seeded(lambda: AutoModelForCausalLM.from_config(FAMILY[family]))
    how = dict(drive=tmp_path, alpha=1.0 if family == "deepseek_v3" else 0.2, n=120)
    want = say(model, "hillinfer", **how)
    assert torch.equal(say(gpu.take(model), "hillinfer", **how), want)


def test_exact_decoding(models, tmp_path, gpu):
    how = dict(drive=tmp_path, custom_generate=hillinfer.exact)
    assert torch.equal(say(placed(models, gpu=gpu), "hillinfer", **how), say(placed(models), "hillinfer", **how))


def test_a_drive_that_scores(models, tmp_path, gpu):
    how = dict(drive=tmp_path, drive_kind="emulated", batch=2, pad=30)
    assert torch.equal(say(placed(models, gpu=gpu), "hillinfer", **how), say(placed(models), "hillinfer", **how))


def test_several_ways_in_one_batch(models, gpu):
    """`models.rows`: each row crosses for itself."""
    outs = []
    for model in (placed(models, gpu=gpu), placed(models)):
        with torch.no_grad():
            caches = [hillinfer.make_cache(model, system, host_budget="64MiB") for system in ("topk", "quest")]
            for cache in caches:
                step(model, cache, 0, 150)
            with as_batch(caches) as cache:
                outs.append(model(PROMPT[:, :1].to(model.device), past_key_values=cache).logits.cpu())
    assert close(outs[:1], outs[1:])


WAITS = {  # of the host, a layer and decode step, whatever the batch
    **dict.fromkeys(("full", "topk", "quest", "quest-dense", "infinigen", "h2o", "snapkv", "streaming", "random"), 0),
    **dict.fromkeys(("hillinfer", "lru", "leoam", "instattention", "flexgen", "dualblade"), 1),
}
CASES = [(system, bar, None) for system, bar in WAITS.items()]
CASES += [("leoam", 2, {"compress": 0.0}), ("leoam-released", 3, {}), ("topk", 2, {"precision": "int2"})]  # on the host
MASKED = ("streaming", "random", "flexgen", "dualblade")  # the mask comes to the host, once a step


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("system,bar,how", CASES)
def test_the_host_hardly_waits(models, tmp_path, gpu, system, bar, how, batch):
    """The threads that copy for the lossless systems wait for themselves."""
    model, steps, n = placed(models, gpu=gpu), 3, 300
    ids, mask = PROMPT[:1, :n].repeat(batch, 1).to(DEVICE), torch.ones(batch, n + steps, dtype=torch.long).to(DEVICE)
    mask[-1, : 30 * (batch - 1)] = 0
    masked = batch > 1 and (system in MASKED or how is not None)
    if how is None:
        how = options(system, tmp_path) | ({"lookahead": True} if system in ("hillinfer", "lru", "leoam") else {})
    with torch.no_grad(), hillinfer.make_cache(model, system, **how) as cache:
        model(ids, attention_mask=mask[:, :n], past_key_values=cache)
        gpu.clear()
        for at in range(n, n + steps):
            model(ids[:, :1], attention_mask=mask[:, : at + 1], past_key_values=cache)
        seen = [gpu.waits(thread) for thread in ("main", "hillinfer-select", "hillinfer-read")]
    assert sum(map(sum, (one.values() for one in seen))) <= bar * LAYERS * steps + masked * steps, seen


@pytest.mark.parametrize("system", ["full", "topk", "quest", "quest-dense", "infinigen", "h2o", "streaming"])
def test_what_a_gpu_says_is_in_the_record_a_step_later(models, gpu, system):
    """Hits as on the CPU, though the GPU knows their number first; and times of its work by events, not launches."""
    kept = []
    for model in (placed(models, gpu=gpu), placed(models)):
        ids, mask = PROMPT[:, :200].to(model.device), torch.ones(2, 203, dtype=torch.long).to(model.device)
        mask[1, :30] = 0
        with torch.no_grad(), hillinfer.make_cache(model, system) as cache:
            for start, end in pairwise((0, 200, 201, 202, 203)):
                began = time.perf_counter_ns()
                model(ids[:, start - end :], attention_mask=mask[:, :end], past_key_values=cache)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                    known = {row.step for row in cache.run.counters.rows}  # without asking
                    assert known >= set(range(1, cache.run.timeline.step))
            spans = [span for span in cache.timeline.spans if span.lane == "gpu" and span.kind != "view"]
            kept.append((cache.counters.frame(), [span for span in spans if span.start_ns >= began], spans))
    (there, last, every), (here, *_) = kept
    where = ["device", "host"]
    assert there.drop(columns=where).equals(here.drop(columns=where)) and there.device.equals(here.host)
    kinds = {span.kind for span in every}
    assert kinds >= {"append", "attend", "dense"} and ("select" in kinds) == (system not in ("full", "streaming"))
    assert {span.layer for span in last} == set(range(LAYERS)) and all(span.end_ns >= span.start_ns for span in every)
    attends = [span for span in last if span.kind == "attend"]  # one after another, within the step
    assert all(one.end_ns <= other.start_ns for one, other in pairwise(attends)) and len(attends) == LAYERS


@pytest.mark.parametrize("system", ["full", "topk", "quest", "h2o", "streaming"])
def test_an_observer_sees_what_it_sees_on_the_cpu(models, gpu, system):
    kept = []
    for model in (placed(models, gpu=gpu), placed(models)):
        ids, mask = PROMPT[:, :203].to(model.device), torch.ones(2, 203, dtype=torch.long).to(model.device)
        mask[0, :30] = 0
        with torch.no_grad(), hillinfer.make_cache(model, system) as cache:
            model(ids[:, :200], attention_mask=mask[:, :200], past_key_values=cache)
            cache.run.observer = AttentionRecord(blocks=16)
            for end in (201, 202, 203):
                model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
            kept.append(cache.run.observer.steps)
    for step, layers in kept[1].items():
        for layer, part in layers.items():
            other = kept[0][step][layer]
            assert np.array_equal(other.chosen, part.chosen) and np.allclose(other.mass, part.mass, atol=2e-3)


def mutated(monkeypatch, owner, name: str, old: str, new: str) -> None:
    """A function of the package with a fault in it."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(old) == 1
    found = {}
    code = compile(source.replace(old, new), inspect.getfile(getattr(owner, name)), "exec")
    exec(code, vars(inspect.getmodule(owner)), found)
    monkeypatch.setattr(owner, name, found[name])


FAULTS = {
    "no wait for a copy": ("flexgen", slots.Slots, "_fill", "self._copies[i].synchronize()", "pass"),
    "no wait for the attention": ("flexgen", slots.Slots, "_fill", "slot.free.wait(self._copies[i])", "pass"),
    "memory in use by its last tenant": (
        "flexgen",
        slots.Slots,
        "_slot",
        ", free=torch.accelerator.current_stream(device.device).record_event()",
        "",
    ),
    "no event at the release": ("flexgen", slots.Slots, "release", "slot.free = torch", "_ = torch"),
    "buffers of inference mode": ("flexgen", slots.Slots, "_slot", "@torch.inference_mode(False)", ""),
    "no wait for the query": (
        "hillinfer",
        crossing,
        "to_host",
        "torch.accelerator.current_stream(far[0]).synchronize()",
        "pass",
    ),
    "an output that is not pinned": ("hillinfer", attention, "to_device", "part.pin_memory()", "part"),
    "a mask that stays on the host": (
        "streaming",
        store.Store,
        "attend",
        "attention.to_device(shown, kv.device)",
        "shown",
    ),
    "keys that stay on the device": (
        "leoam-released",
        quest.Quest,
        "append",
        "keys.to(self.device, torch.float32)",
        "keys",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(models, tmp_path, monkeypatch, fault):
    system, owner, name, old, new = FAULTS[fault]
    how = options(system, tmp_path) | dict(batch=2, pad=30, n=400, new=4, inference=True)
    want = say(placed(models), system, **how)
    mutated(monkeypatch, owner, name, old, new)
    if owner is attention:
        for module in (crossing, away):
            monkeypatch.setattr(module, name, getattr(attention, name))
    with FakeGpu() as gpu:
        try:
            right = torch.equal(say(placed(models, gpu=gpu), system, **how), want)
        except (FakeGpuError, RuntimeError, ValueError):
            right = False
    assert gpu.hazards or not right


def test_the_stand_in_itself():
    """What CUDA would refuse is refused, what it may put off is put off."""
    with FakeGpu() as gpu:
        there, here = torch.zeros(8, device="cuda"), torch.arange(8.0)
        assert there.device.type == "cuda" and torch.equal((there + 1).cpu(), torch.ones(8))
        with pytest.raises(FakeGpuError, match="cuda:0 and cpu"):
            there + here
        with pytest.raises(FakeGpuError, match="data_ptr"):
            there.data_ptr()
        with pytest.raises(TypeError):
            there.numpy()
        down = there.to("cpu", non_blocking=True)
        assert down.isnan().all()
        torch.cuda.synchronize()
        assert not down.any() and not gpu.hazards
        pinned = here.pin_memory()
        there.copy_(pinned, non_blocking=True)
        pinned += 1
        torch.cuda.synchronize()
        assert [text.partition(":")[0] for text in gpu.hazards] == ["pinned"]
        gpu.hazards.clear()
        with torch.cuda.Stream() as side:
            there += 1
        there += 1
        assert [text.partition(":")[0] for text in gpu.hazards] == ["race"]
        gpu.hazards.clear()
        torch.cuda.current_stream().wait_stream(side)
        there += 1
        assert not gpu.hazards


def test_a_layers_launches_are_those_of_the_model():
    """Of a steady step: a token's code, scores, ranks and choice for a layer of an 8B model."""
    with FakeGpu() as gpu:
        held, n = DeviceCodes(1, 8, 128, 8, DEVICE), 300
        held.append(torch.linspace(-1, 1, 8 * n * 128).view(1, 8, n, 128).bfloat16().to("cuda"))
        key, query = (torch.full((1, heads, 1, 128), 0.5).bfloat16().to("cuda") for heads in (8, 32))
        for _ in range(3):
            torch.cuda.synchronize()
            gpu.clear()
            held.append(key)
            found = held.ranks(query[:, :, 0], 0.1, None)
            TopK().choose(Step(held.codes.n, 60, 4, 16, 0, 0, lambda found=found: found, None))
        assert gpu.launches <= LAUNCHES, gpu.launches


def test_selection_on_the_device_is_the_hosts_to_the_bit():
    """Random keys of growing scale, ties and padding; codes, ranks and choice, without a wait. Where the host has heard
    by the next append that no scale doubled, or that one did, and where it has not.
    """
    random = np.random.default_rng(0)
    for case in range(200):
        heads, group, dim, n = (int(random.choice(of)) for of in ((1, 2, 8), (1, 4, 7), (32, 128, 576), (40, 300, 900)))
        bits, few = (8, 4)[case % 2], int(random.choice((1, 7, 1000)))  # few values give many ties
        keys = torch.from_numpy(random.integers(-few, few + 1, (2, heads, n, dim))).float()
        keys *= 2.0 ** torch.arange(n).mul(4).floor_divide(n)[:, None]  # scales double three times
        query = torch.from_numpy(random.integers(-few, few + 1, (2, heads * group, dim))).float()
        valid = torch.arange(n) >= torch.tensor([[0], [n // 3 * (case % 3 // 2)]])
        sizes, scaling = (n, int(random.integers(24, n)), 4, 16, 0, 0), float(10.0 ** random.integers(-4, 1))
        held = codes.KeyCodes(2, heads, dim, bits)
        with FakeGpu() as gpu:
            there, asked, seen = DeviceCodes(2, heads, dim, bits, DEVICE), query.to("cuda"), valid.to("cuda")
            pieces = [part.to("cuda") for part in keys.tensor_split([n // 2, n - 1], 2)]
            gpu.clear()
            for piece in pieces:
                there.append(piece)
                if case % 4 > 1:
                    torch.cuda.synchronize()
                    gpu.clear()
            found = there.ranks(asked, scaling, seen)
            got, _ = TopK().choose(Step(*sizes, lambda found=found: found, None))
            assert not gpu.waits(model=True) and not gpu.hazards
            there.catch_up()
            got, found, coded = got.cpu().numpy(), found.cpu().numpy(), there.codes.view().cpu()
        for piece in keys.tensor_split([n // 2, n - 1], 2):
            held.append(piece)
        assert torch.equal(held.codes.view(), coded), case
        for row in range(2):
            quantised, unit = held.query(query[row], row)
            scores = held.scorer(quantised, row)(None)
            scores[:, ~valid[row].numpy()] = codes.NEVER
            ranks = head_ranks(scores, np.repeat(unit * np.float32(scaling), group))
            assert np.array_equal(found[row], ranks), case
            assert np.array_equal(got[row], TopK().select(Step(*sizes, lambda: ranks, None))), case  # noqa: B023


@pytest.mark.parametrize("device,rates", [("cpu", ",rates"), ("stand-in", "")])
def test_the_gpus_script_runs_without_one(tmp_path, monkeypatch, device, rates):
    monkeypatch.setattr(gpu_speed, "STEPS", 4)
    words = ["--shape", "tiny", "--drive", str(tmp_path), "--out", str(tmp_path), "--few"]
    words += ["--device", "cuda" if device == "stand-in" else "cpu", "--parts", f"facts,equality,speed{rates}"]
    with FakeGpu() if device == "stand-in" else nullcontext() as gpu:
        assert gpu_script.main(words, gpu and gpu.take) == 0
        assert gpu is None or not gpu.hazards
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["part"] == "speed" and "ms" in row]
    assert {row["part"] for row in rows} == {"facts", "equality", "attention", "speed", "end", *rates.split(",")[1:]}
    assert len(measured) == 2 * 4 and not any("failed" in row for row in rows)


def test_what_fails_is_a_row_and_the_exit_code(tmp_path, monkeypatch, capsys):
    """An error in one case must not take the others with it."""
    monkeypatch.setattr(gpu_script, "said", lambda model, system, *_, **__: torch.tensor([1 / (system != "topk")]))
    monkeypatch.setattr(gpu_speed, "speed", lambda *_, **__: torch.zeros(2) + torch.zeros(3))
    words = ["--shape", "tiny", "--device", "cpu", "--drive", str(tmp_path), "--out", str(tmp_path), "--few"]
    assert gpu_script.main([*words, "--parts", "equality,speed"]) == 2 + 8
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["system"] for row in rows if row["part"] == "equality" and "failed" in row] == ["topk"] * 2
    assert sum(row.get("same", False) for row in rows if row["part"] == "equality") == 2 * (len(FEW) - 1)


def test_layers_on_two_devices_are_refused(models):
    """device_map="auto" over two GPUs: their layers cannot share buffers on one of them."""
    cache = hillinfer.make_cache(models("llama"), "full")
    there = torch.device("meta")
    cache.run.start(Geometry(1, 2, 16, torch.float32, there))
    with pytest.raises(hillinfer.UsageError, match="layers on meta and cpu: load the model on one device"):
        cache.run.start(Geometry(1, 2, 16, torch.float32, torch.device("cpu")))


def test_one_gpu_takes_one_worker(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(hillinfer.UsageError, match="leave out --workers"):
        list(sweep.run_all([None, None], workers=2))


@pytest.mark.parametrize("drive", [True, False])
def test_codes_are_in_gpu_memory_as_far_as_allowed(models, tmp_path, gpu, drive):
    """Codes of the longest context to come, or none; tokens are the same."""
    system, where = ("hillinfer", {"drive": tmp_path}) if drive else ("topk", {"host_budget": "64MiB"})
    how = where | dict(alpha=0.1, max_tokens=400)
    want, need = say(placed(models), system, n=300, **how), LAYERS * 400 * 32 * 9 // 8
    for budget, there in ((None, True), (need, True), (need - 1, False), (0, False)):
        model = placed(models, gpu=gpu)
        with torch.no_grad(), hillinfer.make_cache(model, system, device_budget=budget, **how) as cache:
            ids, words = PROMPT[:1, :300].to(model.device), dict(max_new_tokens=NEW, do_sample=False)
            assert torch.equal(model.generate(ids, past_key_values=cache, **words).cpu(), want)
            memory, lane = cache.memory(), "gpu" if there else "cpu"
            assert ("key codes in GPU memory" in cache.why_split()) == there
            assert (memory["device"] > 0, memory["codes"] > 0) == (there, not there)
            assert {span.lane for span in cache.timeline.spans if span.kind in ("encode", "select")} == {lane}


def test_what_is_expected_is_reserved_at_once(models, gpu):
    """Layers that grow in turn would leave holes of every older size in a GPU's memory."""
    model = placed(models, gpu=gpu)
    with torch.no_grad(), hillinfer.make_cache(model, "full", max_tokens=200) as cache:
        step(model, cache, 0, 100)
        before = [layer.store.buffer.data for layer in cache.tiered]
        step(model, cache, 100, 200)
        assert all(layer.store.buffer.data is data for layer, data in zip(cache.tiered, before, strict=True))


def test_the_stand_in_leaves_nothing_behind():
    """Not even in what torch remembers of a default device: a model loaded later would lack its buffers."""
    owners = torch, torch.cuda, torch.accelerator, torch.Tensor, threading.Thread, Future, ThreadPoolExecutor
    before = [dict(vars(owner)) for owner in owners]
    with FakeGpu(), torch.device("cuda"):
        torch.tensor([1.0])
    assert [dict(vars(owner)) for owner in owners] == before
    with torch.device("meta"):
        assert torch.tensor([1.0]).device.type == "meta"
