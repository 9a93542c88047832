"""Every sample answered by every system at every alpha: on this process, on many, or on a cluster.

A job is one sample of one task with all its ways of answering, which share one prefill. Only the caller writes results,
so that a cluster's workers need no common folder.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np

from hillinfer.errors import UsageError
from hillinfer.longbench.models import load_model
from hillinfer.longbench.results import KEY
from hillinfer.longbench.tasks import Task

SEED = 42
BATCH = 32  # jobs whose results come at once from a backend that cannot give them one by one (Ray)


@dataclass(frozen=True)
class Way:
    """A system at one alpha; None for a system that attends to everything."""

    system: str
    alpha: float | None

    def __str__(self) -> str:
        return self.system if self.alpha is None else f"{self.system} {self.alpha:g}"


@dataclass(frozen=True)
class Asking:
    """How samples are asked: whatever changes an answer, but the model, the sample and the way."""

    max_length: int | None = None  # tokens; None is LongBench's rule for the model's window
    chat: bool | None = None  # None: where the tokenizer has a chat template
    question: str = "stepwise"  # or prefilled
    dtype: str = "auto"
    prefill_chunk: int | None = None
    threads: int = 1
    seed: int = SEED
    share_prefill: bool = True
    options: tuple[tuple[str, object], ...] = ()  # further fields of `Settings`

    def identity(self) -> dict:
        """What all runs of one folder must have in common, as JSON has it; sharing a prefill changes no answer."""
        values = asdict(self) | {"options": dict(self.options)}
        del values["share_prefill"]
        return values


@dataclass(frozen=True)
class Job:
    model: str  # its name in results
    path: str  # what it is loaded from
    task: Task
    record: dict
    ways: tuple[Way, ...]
    asking: Asking
    drive: str | None = None  # a folder on the machine that works; None is its folder for temporary files


def ways_of(systems: Iterable[str], alphas: Iterable[float], options: dict) -> list[Way]:
    """`full` first, as what the others are compared with. UsageError for what cannot run."""
    from hillinfer.evaluator.policies import Full
    from hillinfer.systems.registry import find_system

    ways = {}
    for name in dict.fromkeys(("full", *systems)):
        for alpha in alphas:
            system, _ = find_system(name, {"alpha": alpha, "drive": tempfile.gettempdir()} | options)
            ways[Way(name, None if issubclass(system.policy, Full) else alpha)] = None
    return list(ways)


def sample(records: list[dict], n: int, seed: int) -> list[dict]:
    """n rows drawn with a seed (0 is all); a larger n holds those of a smaller one."""
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in sorted(order[: n or None])]


def plan(jobs: Iterable[Job], done: set[tuple]) -> list[Job]:
    """What is left: jobs with the ways whose results are missing."""
    left = []
    for job in jobs:
        missing = tuple(way for way in job.ways if key(job, way) not in done)
        if missing:
            left.append(replace(job, ways=missing))
    return left


def key(job: Job, way: Way) -> tuple:
    values = dict(model=job.model, task=job.task.name, id=job.record["_id"], system=way.system, alpha=way.alpha)
    return tuple(values[name] for name in KEY)


def run_all(jobs: list[Job], workers: int = 1, cluster: str | None = None) -> Iterator[list[dict]]:
    """Each job's rows as they come, in any order. See `backend` for `cluster`."""
    if not jobs or (workers == 1 and cluster is None):
        yield from map(run_job, jobs)
        return
    try:
        import joblib
    except ImportError:
        raise UsageError("several processes need joblib: pip install 'hillinfer[longbench]'") from None
    with backend(joblib, workers, cluster) as parallel:
        step = len(jobs) if parallel.return_generator else BATCH
        for start in range(0, len(jobs), step):
            yield from parallel(joblib.delayed(run_job)(job) for job in jobs[start : start + step])


@contextmanager
def backend(joblib, workers: int, cluster: str | None):
    """`dask:HOST:PORT` or `ray[:ADDRESS]` names a running cluster; None takes processes of this machine."""
    kind, _, address = (cluster or "").partition(":")
    with ExitStack() as stack:
        try:
            if kind == "dask":
                from distributed import Client

                stack.enter_context(Client(address or None, timeout=10))
            elif kind == "ray":
                import ray
                from ray.util.joblib import register_ray

                register_ray()
                ray.init(address=address or None, ignore_reinit_error=True)
                stack.callback(ray.shutdown)
            elif kind:
                raise UsageError(f"no cluster '{cluster}'; give dask:HOST:PORT, ray or ray:ADDRESS")
        except ImportError:
            package = {"dask": "'hillinfer[cluster]'"}.get(kind, kind)
            raise UsageError(f"a {kind} cluster needs {kind}: pip install {package}") from None
        except (OSError, ConnectionError) as error:
            raise UsageError(f"no {kind} cluster at {address} ({error}); start one, or leave out --cluster") from None
        watched = {} if kind else {"initializer": _end_with, "initargs": (os.getpid(),)}
        stack.enter_context(joblib.parallel_config(backend=kind or "loky", **watched))
        returns = "list" if kind == "ray" else "generator_unordered"  # ray's backend has no generators
        yield joblib.Parallel(n_jobs=-1 if kind else workers, batch_size=1, return_as=returns)


def run_job(job: Job) -> list[dict]:
    """One sample's rows, a row for each way; `seconds` of all of them are the job's."""
    import torch

    from hillinfer.longbench import runner
    from hillinfer.longbench.metrics import score
    from hillinfer.systems.registry import list_systems

    began = time.perf_counter()

    model, tokenizer = load_model(job.path, job.asking.dtype, job.asking.threads, job.asking.seed)
    prompt = prompt_of(job, model.config, tokenizer)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    systems = list_systems()
    sharing = [systems[way.system].policy for way in job.ways if shares_prefill(systems[way.system].policy)]
    shared_by = sharing if job.asking.share_prefill and len(sharing) > 1 else []
    source, rows = None, []
    common = dict(model=job.model, task=job.task.name, id=job.record["_id"], suite=job.task.suite)
    common |= {name: job.record[name] for name in ("answers", "all_classes", "length")}
    common |= dict(
        buckets=job.task.buckets(job.record),
        original_tokens=prompt.original,
        truncated=prompt.truncated,
        cut_again=prompt.again,
    )
    common |= dict(question_tokens=len(prompt.ids) - prompt.document)
    for way in job.ways:
        with torch.inference_mode(), cache_for(model, job, way) as cache:
            policy, paid_s, fill_s = systems[way.system].policy, 0.0, 0.0
            if shared := policy in shared_by:
                if source is None:
                    looking = [kind for kind in shared_by if kind.watches]
                    source, paid_s = timed(runner.prefill, model, prompt, job.asking.prefill_chunk, looking)
                    plain_s = paid_s - sum(source.seconds.values())
                prefill_s = plain_s + source.seconds.get(policy, 0.0)
                _, fill_s = timed(cache.fill, source, model.device, job.asking.prefill_chunk)
            else:
                document = prompt.ids[: prompt.document]
                _, paid_s = timed(runner.feed, model, cache, document, job.asking.prefill_chunk)
                prefill_s = paid_s
            answer = runner.answer(model, tokenizer, job.task, prompt, cache, prefill_s)
            record_bytes = cache.run.geometry.record_bytes
        rows.append(common | {
            "system": way.system, "alpha": way.alpha, "pred": answer.text,
            "score": score(job.task, answer.text, job.record["answers"], job.record["all_classes"]),
            "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens,
            "attended": answer.attended, "cached": answer.cached, "rates": answer.rates,
            "shared": shared, "prefill_ms": answer.prefill_ms, "paid_ms": paid_s * 1e3, "fill_ms": fill_s * 1e3,
            "ms_per_token": answer.ms_per_token, "drive_bytes_per_token": answer.drive_bytes_per_token,
            "kv_bytes_per_token": answer.attended * record_bytes * layers,
            "memory_bytes": sum(size for kind, size in answer.memory.items() if kind != "drive"),
            "seconds": (now := time.perf_counter()) - began,
        })  # fmt: skip
        began = now
    return rows


def shares_prefill(policy: type) -> bool:
    """True if a copied prefill serves as well as its own: the policy does not watch it, or can be shown the copy."""
    return policy.watches or policy.late


def timed(function, *arguments):
    """What the call returns, and its seconds."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


def cache_for(model, job: Job, way: Way):
    """The cache of one way; only systems that need a drive get one."""
    from hillinfer.systems.registry import list_systems, make_cache

    options = dict(job.asking.options) | ({} if way.alpha is None else {"alpha": way.alpha})
    if list_systems()[way.system].needs_drive:
        options["drive"] = job.drive or tempfile.gettempdir()
    else:
        options = {name: value for name, value in options.items() if name in ("alpha", "precision")}
    return make_cache(model, way.system, **options)


def prompt_of(job: Job, config, tokenizer):
    """The sample's prompt, at most as long as the task and the model allow."""
    from hillinfer.longbench.prompts import build, official_max_length

    window = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = job.asking.max_length
    if limit is None and job.task.truncates and window:
        limit = official_max_length(window)
    room = window - job.task.max_new_tokens if window else None
    limits = [n for n in (limit, room) if n is not None]
    chat = bool(tokenizer.chat_template) if job.asking.chat is None else job.asking.chat
    stepwise = job.asking.question == "stepwise"
    return build(job.task, job.record, tokenizer, min(limits, default=1 << 40), chat, stepwise, room)


def _end_with(parent: int) -> None:
    """End this process soon after its parent's end. joblib's own workers would stay for minutes after a SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
