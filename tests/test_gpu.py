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
