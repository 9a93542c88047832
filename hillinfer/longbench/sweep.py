"""Answer every sample with every system at every alpha: in this process, in several, or on a cluster.

A job is one sample of one task, answered by all variants over one shared prefill. Only the caller writes results, so
cluster workers need no shared folder.
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
BATCH = 32  # jobs per batch on a backend that cannot stream results (Ray)


@dataclass(frozen=True)
class Variant:
    """A system at one alpha; `alpha` is None for full attention."""

    system: str
    alpha: float | None

    def __str__(self) -> str:
        return self.system if self.alpha is None else f"{self.system} {self.alpha:g}"


@dataclass(frozen=True)
class EvalSettings:
    """Everything that affects an answer besides model, sample and variant."""

    max_length: int | None = None  # tokens; None applies LongBench's rule for the context window
    chat: bool | None = None  # None: if the tokenizer has a chat template
    question: str = "stepwise"  # or prefilled
    dtype: str = "auto"
    prefill_chunk: int | None = None
    threads: int = 1
    seed: int = SEED
    share_prefill: bool = True
    options: tuple[tuple[str, object], ...] = ()  # further fields of `Settings`

    def identity(self) -> dict:
        """The settings that all runs of one folder must share, as JSON. A shared prefill changes no answer."""
        values = asdict(self) | {"options": dict(self.options)}
        del values["share_prefill"]
        return values


@dataclass(frozen=True)
class Job:
    """One sample and its variants, to be answered by one worker."""

    model: str  # its name in the results
    path: str  # local folder or Hub name
    task: Task
    record: dict
    variants: tuple[Variant, ...]
    settings: EvalSettings
    drive: str | None = None  # folder on the worker's machine; None uses its temporary folder


def variants_of(systems: Iterable[str], alphas: Iterable[float], options: dict) -> list[Variant]:
    """All variants, starting with the reference `full`. Raises UsageError for a system that cannot run."""
    from hillinfer.evaluator.policies import Full
    from hillinfer.systems.registry import find_system

    variants = {}
    for name in dict.fromkeys(("full", *systems)):
        for alpha in alphas:
            system, _ = find_system(name, {"alpha": alpha, "drive": tempfile.gettempdir()} | options)
            variants[Variant(name, None if issubclass(system.policy, Full) else alpha)] = None
    return list(variants)


def sample(records: list[dict], n: int, seed: int) -> list[dict]:
    """A seeded sample of n records (0: all). Samples are nested: a larger n includes a smaller one."""
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in sorted(order[: n or None])]


def plan(jobs: Iterable[Job], done: set[tuple]) -> list[Job]:
    """The remaining work: jobs reduced to variants without a result."""
    remaining = []
    for job in jobs:
        missing = tuple(variant for variant in job.variants if key(job, variant) not in done)
        if missing:
            remaining.append(replace(job, variants=missing))
    return remaining


def key(job: Job, variant: Variant) -> tuple:
    values = dict(model=job.model, task=job.task.name, id=job.record["_id"], system=variant.system, alpha=variant.alpha)
    return tuple(values[name] for name in KEY)


def run_all(jobs: list[Job], workers: int = 1, cluster: str | None = None) -> Iterator[list[dict]]:
    """Yield each job's rows as they complete, in any order. See `backend` for `cluster`."""
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
    """A `joblib.Parallel` over local processes (None) or a running cluster: `dask:HOST:PORT` or `ray[:ADDRESS]`."""
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
                raise UsageError(f"no cluster '{cluster}'; use dask:HOST:PORT, ray or ray:ADDRESS")
        except ImportError:
            package = {"dask": "'hillinfer[cluster]'"}.get(kind, kind)
            raise UsageError(f"a {kind} cluster needs {kind}: pip install {package}") from None
        except (OSError, ConnectionError) as error:
            raise UsageError(f"no {kind} cluster at {address} ({error}); start one, or leave out --cluster") from None
        initializer = {} if kind else {"initializer": _exit_with_parent, "initargs": (os.getpid(),)}
        stack.enter_context(joblib.parallel_config(backend=kind or "loky", **initializer))
        returns = "list" if kind == "ray" else "generator_unordered"  # Ray's backend has no generators
        yield joblib.Parallel(n_jobs=-1 if kind else workers, batch_size=1, return_as=returns)


def run_job(job: Job) -> list[dict]:
    """Answer one sample: one row per variant. Their `seconds` add up to the job's run time."""
    import torch

    from hillinfer.longbench import runner
    from hillinfer.longbench.metrics import score
    from hillinfer.systems.registry import list_systems

    began = time.perf_counter()
    model, tokenizer = load_model(job.path, job.settings.dtype, job.settings.threads, job.settings.seed)
    prompt = prompt_of(job, model.config, tokenizer)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    systems = list_systems()
    policies = [systems[variant.system].policy for variant in job.variants]
    sharing = [policy for policy in policies if shares_prefill(policy)]
    shared_by = sharing if job.settings.share_prefill and len(sharing) > 1 else []
    source, rows = None, []
    common = dict(model=job.model, task=job.task.name, id=job.record["_id"], suite=job.task.suite)
    common |= {name: job.record[name] for name in ("answers", "all_classes", "length")}
    common |= dict(
        buckets=job.task.buckets(job.record),
        original_tokens=prompt.original,
        truncated=prompt.truncated,
        cut_again=prompt.recut,
    )
    common |= dict(question_tokens=len(prompt.ids) - prompt.document)
    for variant in job.variants:
        with torch.inference_mode(), cache_for(model, job, variant) as cache:
            policy, paid_s, fill_s = systems[variant.system].policy, 0.0, 0.0
            if shared := policy in shared_by:
                if source is None:
                    observers = [kind for kind in shared_by if kind.watches]
                    source, paid_s = timed(runner.prefill, model, prompt, job.settings.prefill_chunk, observers)
                    plain_s = paid_s - sum(source.seconds.values())
                prefill_s = plain_s + source.seconds.get(policy, 0.0)
                _, fill_s = timed(source.fill, cache, model.device, job.settings.prefill_chunk)
            else:
                document = prompt.ids[: prompt.document]
                _, paid_s = timed(runner.feed, model, cache, document, job.settings.prefill_chunk)
                prefill_s = paid_s
            answer = runner.answer(model, tokenizer, job.task, prompt, cache, prefill_s)
            record_bytes = cache.run.geometry.record_bytes
        rows.append(common | {
            "system": variant.system, "alpha": variant.alpha, "pred": answer.text,
            "score": score(job.task, answer.text, job.record["answers"], job.record["all_classes"]),
            "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens,
            "attended": answer.attended, "cached": answer.cached, "rates": answer.rates,
            "shared": shared, "prefill_ms": answer.prefill_ms, "paid_ms": paid_s * 1e3, "fill_ms": fill_s * 1e3,
            "ms_per_token": answer.ms_per_token, "drive_bytes_per_token": answer.drive_bytes_per_token,
            "kv_bytes_per_token": answer.attended * record_bytes * layers,
            "memory_bytes": answer.memory_bytes,
            "seconds": (now := time.perf_counter()) - began,
        })  # fmt: skip
        began = now
    return rows


def shares_prefill(policy: type) -> bool:
    """True if the policy can start from a copied prefill: it observes the shared pass, or needs no observation."""
    return policy.watches or policy.late


def timed(function, *arguments):
    """The call's result and its duration in seconds."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


def cache_for(model, job: Job, variant: Variant):
    """The cache of one variant. Only systems that need a drive get one."""
    from hillinfer.systems.registry import list_systems, make_cache

    options = dict(job.settings.options) | ({} if variant.alpha is None else {"alpha": variant.alpha})
    if list_systems()[variant.system].needs_drive:
        options["drive"] = job.drive or tempfile.gettempdir()
    else:
        options = {name: value for name, value in options.items() if name in ("alpha", "precision")}
    return make_cache(model, variant.system, **options)


def prompt_of(job: Job, config, tokenizer):
    """The sample's prompt, truncated to the limits of task and model."""
    from hillinfer.longbench.prompts import build, official_max_length
    from hillinfer.systems.shapes import window_of

    window = window_of(config)
    limit = job.settings.max_length
    if limit is None and job.task.truncates and window:
        limit = official_max_length(window)
    room = window - job.task.max_new_tokens if window else None
    limits = [n for n in (limit, room) if n is not None]
    chat = bool(tokenizer.chat_template) if job.settings.chat is None else job.settings.chat
    stepwise = job.settings.question == "stepwise"
    return build(job.task, job.record, tokenizer, min(limits, default=1 << 40), chat, stepwise, room)


def _exit_with_parent(parent: int) -> None:
    """Exit soon after the parent does. joblib's workers would otherwise outlive a SIGKILL by minutes."""

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=poll, daemon=True).start()
