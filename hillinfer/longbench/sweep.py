"""Answer every sample with every system at every alpha: in this process, in several, or on a cluster.

Only the caller writes results, so cluster workers need no shared folder.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

import numpy as np
import torch

from hillinfer.errors import UsageError
from hillinfer.longbench.job import Job, Variant, run_job
from hillinfer.longbench.results import KEY

BATCH = 32  # jobs per batch on a backend that cannot stream results (Ray)


def variants_of(
    systems: Iterable[str], alphas: Iterable[float], options: dict, questions: Iterable[str] = ("stepwise",)
) -> list[Variant]:
    """All variants, starting with the reference `full`. Raises UsageError for a system that cannot run."""
    from hillinfer.evaluator.policies import Full
    from hillinfer.systems.registry import find_system

    variants = {}
    for name in dict.fromkeys(("full", *systems)):
        for alpha in alphas:
            system, _ = find_system(name, {"alpha": alpha, "drive": tempfile.gettempdir()} | options)
            variants[name, None if issubclass(system.policy, Full) else alpha] = None
    return [Variant(*variant, question) for question in questions for variant in variants]


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
    values = dict(model=job.model, task=job.task.name, id=job.record["_id"]) | asdict(variant)
    return tuple(values[name] for name in KEY)


def run_all(jobs: list[Job], workers: int = 1, cluster: str | None = None) -> Iterator[list[dict]]:
    """Yield each job's rows as they complete, in any order. See `backend` for `cluster`."""
    if not jobs or (workers == 1 and cluster is None):
        yield from map(run_job, jobs)
        return
    if workers > 1 and torch.cuda.is_available():
        raise UsageError(f"each of {workers} workers would load the model into the GPU's memory: leave out --workers")
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


def _exit_with_parent(parent: int) -> None:
    """Exit soon after the parent does. joblib's workers would otherwise outlive a SIGKILL by minutes."""

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=poll, daemon=True).start()
