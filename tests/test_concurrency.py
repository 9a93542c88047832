"""Two caches on one model, two models, threads and a fork: correct, or rejected with a clear error."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import hillinfer
from hillinfer import UsageError
from hillinfer.longbench.runner import feed

ROOT = Path(__file__).parents[1]
NEW = 8


@pytest.fixture
def both(models):
    return [models("llama"), models("qwen3")]


def generate(model, cache, ids: torch.Tensor, new: int = NEW) -> list[int]:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


def alone(model, ids: torch.Tensor, **options) -> list[int]:
    with hillinfer.make_cache(model, "hillinfer", **options) as cache:
        return generate(model, cache, ids)


@pytest.mark.parametrize("lookahead", [True, False])
def test_two_caches_take_turns_on_one_model(both, prompt, tmp_path, lookahead):
    model, prompts = both[0], [prompt, prompt.flip(1)[:, :120]]
    options = dict(alpha=0.3, drive=tmp_path, lookahead=lookahead)
    want = [alone(model, ids, **options) for ids in prompts]
    caches = [hillinfer.make_cache(model, "hillinfer", **options) for _ in prompts]
    got: list[list[int]] = [[], []]
    with caches[0], caches[1], torch.no_grad():
        last = list(prompts)
        for _ in range(NEW):  # the prefill of both, and then token by token
            for i, cache in enumerate(caches):
                last[i] = model(last[i], past_key_values=cache).logits[:, -1:].argmax(-1)
                got[i].append(int(last[i]))
    assert got == want


@pytest.mark.parametrize("kind", ["ssd", "emulated"])
def test_threads_with_caches_of_their_own_on_two_models(both, prompt, tmp_path, kind):
    options = dict(alpha=0.3, drive=tmp_path, drive_kind=kind)
    jobs = [(model, prompt.roll(i, 1)) for i in range(3) for model in both]
    want = [alone(model, ids, **options) for model, ids in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(lambda job: alone(*job, **options), jobs)) == want
    assert not list(tmp_path.iterdir())


def test_a_thread_in_the_middle_of_another_ones_step_is_refused(both, prompt):
    model = both[0]
    with hillinfer.make_cache(model, "topk", alpha=0.3) as cache, ThreadPoolExecutor(1) as pool:
        feed(model, cache, prompt[0].tolist())
        kv = torch.randn(1, 2, 1, 16)
        cache.layers[0].update(kv, kv)  # a step has begun
        for call in (lambda: cache.layers[0].update(kv, kv), lambda: cache.layers[1].update(kv, kv)):
            with pytest.raises(UsageError, match="a cache of its own"):
                pool.submit(call).result()
        with pytest.raises(UsageError, match="uses this cache"):
            pool.submit(cache.crop, -1).result()
        for layer in cache.layers[1:]:
            layer.update(kv, kv)
        assert cache.get_seq_length() == prompt.shape[1] + 1


def test_of_two_threads_that_generate_at_once_one_is_refused(both, prompt):
    model, errors, out = both[0], [], []
    for _ in range(5):
        with hillinfer.make_cache(model, "topk", alpha=0.3) as cache:
            feed(model, cache, prompt[0, :-1].tolist())
            barrier = threading.Barrier(2)

            def work(cache=cache, barrier=barrier):
                barrier.wait()
                try:
                    out.append(generate(model, cache, prompt))
                except UsageError as error:
                    errors.append(str(error))
                except (RuntimeError, ValueError, IndexError) as error:  # transformers' own refusal of a longer cache
                    errors.append(str(error))

            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert errors and len(errors) + len(out) == 10


def test_a_thread_may_go_on_where_another_has_ended(both, prompt, tmp_path):
    model = both[0]
    with ThreadPoolExecutor(1) as pool:
        answers = []
        for run in (lambda work, *given: work(*given), lambda work, *given: pool.submit(work, *given).result()):
            with hillinfer.make_cache(model, "hillinfer", alpha=0.3, drive=tmp_path) as cache:
                feed(model, cache, prompt[0, :-1].tolist())
                answers.append(run(generate, model, cache, prompt))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("system", ["topk", "hillinfer"])
def test_one_conversation_may_hop_over_the_threads_of_a_pool(both, prompt, tmp_path, system):
    options = dict(alpha=0.3) | ({"drive": tmp_path} if system == "hillinfer" else {})
    answers = []
    for pools in ([ThreadPoolExecutor(1)], [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]):
        with hillinfer.make_cache(both[0], system, **options) as cache:
            out = prompt
            for i in range(NEW):
                more = pools[i % len(pools)].submit(generate, both[0], cache, out, new=1).result()
                out = torch.cat((out, torch.tensor([more])), 1)
            answers.append(out.tolist())
    assert answers[0] == answers[1]


FORK = """
import os, sys, torch, hillinfer
from hillinfer.longbench.runner import feed
from tests.conftest import FAMILIES
torch.set_num_threads(1)
torch.manual_seed(0)
model = FAMILIES["llama"]().eval()
ids = list(range(2, 90)) * 2
options = dict(alpha=0.3, drive=sys.argv[1])
def rest(cache):
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), past_key_values=cache,
                         max_new_tokens=6, do_sample=False)
    return out[0].tolist()
for system in sys.argv[2:]:
    with hillinfer.make_cache(model, system, **options) as cache:
        feed(model, cache, ids[:-1])
        want = rest(cache)
    with hillinfer.make_cache(model, system, **options) as cache:
        feed(model, cache, ids[:-1])
        pid = os.fork()
        if pid == 0:
            try:
                rest(cache)
                sys.exit(3)
            except hillinfer.UsageError as error:
                print(error, flush=True)
            cache.close()
            del cache
            sys.exit(0)  # with all that runs at an exit
        assert os.waitpid(pid, 0)[1] == 0
        assert rest(cache) == want, "the child has done harm"
        child = os.fork()
        if child == 0:
            with hillinfer.make_cache(model, system, **options) as own:
                feed(model, own, ids[:-1])
                os._exit(0 if rest(own) == want else 4)
        assert os.waitpid(child, 0)[1] == 0
    print(system, "is right", flush=True)
"""


def test_a_forked_process_is_refused_and_does_no_harm(tmp_path):
    systems = ["hillinfer", "flexgen", "instattention"]
    command = [sys.executable, "-c", FORK, tmp_path, *systems]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    refused, right = ran.stdout.splitlines()[::2], ran.stdout.splitlines()[1::2]
    assert right == [f"{system} is right" for system in systems] and all("before a fork" in line for line in refused)
    assert not list(tmp_path.iterdir())
