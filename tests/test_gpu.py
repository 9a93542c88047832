"""The GPU's path on a stand-in for a GPU (tests/fake_gpu): what is said, what goes wrong silently, what the host waits for."""

import copy
import inspect
import textwrap

import pytest
import torch

import hillinfer
from hillinfer.systems.lossless import slots
from hillinfer.systems.registry import list_systems
from tests.fake_gpu import FakeGpu, FakeGpuError, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))

LAYERS, NEW = 3, 6  # of the tiny model; tokens to generate
ON_DRIVE = ("hillinfer", "lru", "leoam", "flexgen", "dualblade", "instattention")
PROMPT = torch.randint(2, 97, (2, 400), generator=torch.Generator().manual_seed(11))


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


def say(model, system: str, batch: int = 1, pad: int = 0, n: int = 150, inference: bool = False, new=NEW, **how):
    """generate's tokens, on the host."""
    ids = PROMPT[:batch, :n].clone()
    ids[-1, :pad] = 0
    ids, mask = ids.to(model.device), (ids != 0).long().to(model.device)
    with torch.inference_mode(inference), torch.no_grad(), hillinfer.make_cache(model, system, **how) as cache:
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False, num_beams=1
        ).cpu()


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
        outs = [step(model, cache, *pair) for pair in zip(ends, ends[1:])]
        cache.crop(-80)
        outs += [step(model, cache, *pair) for pair in ((251, 252), (252, 270), (270, 271))]
        return [out.cpu() for out in outs]


def session(model, system: str, folder, **how) -> list[torch.Tensor]:
    path = folder / model.device.type
    hillinfer.keep_session(path, model, PROMPT[0, :200].tolist(), system, **how).close()
    cache, ids = hillinfer.open_session(path, model, system, **how)
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
