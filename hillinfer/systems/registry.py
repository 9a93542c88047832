"""Named systems. A policy without an entry here is a system of its own name; its run follows from the settings."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.evaluator.policies import POLICIES, Full, TopK
from hillinfer.evaluator.policy import Policy
from hillinfer.prefix_store.blocks import PrefixStore
from hillinfer.prefix_store.keeper import use_store
from hillinfer.run import Run
from hillinfer.systems.baselines import BASELINES
from hillinfer.systems.baselines.quest import QuestDense
from hillinfer.systems.baselines.released import LeoAMReleased
from hillinfer.systems.hillinfer.run import AttendingRun, ScoringRun
from hillinfer.systems.leoam.policy import LeoAM
from hillinfer.systems.leoam.run import LeoAMRun
from hillinfer.systems.lossless.run import StreamedRun

POLICIES |= BASELINES  # the one dict of all policies, which users extend


@dataclass(frozen=True)
class System:
    """A policy with a run and settings.

    about        one line
    run          opens the layers' stores; None takes what the settings ask for (`run_for`)
    needs_drive  refuse to run without a drive folder
    settings     defaults, which the user may override
    fixed        settings that the user may not override
    """

    policy: type[Policy]
    about: str
    run: type[Run] | None = None
    needs_drive: bool = False
    settings: dict = field(default_factory=dict)
    fixed: dict = field(default_factory=dict)


_LOSSLESS = "lossless: K and V tensors streamed from the drive at each step, the next layer prefetched"
SYSTEMS = {
    "lru": System(TopK, "hillinfer with an LRU hot pool: the control", needs_drive=True, settings={"placement": "lru"}),
    "hillinfer": System(
        TopK, "hot pool by hit counters in host memory, cold pool on the drive (arXiv 2602.18750)", needs_drive=True
    ),
    "flexgen": System(
        Full, f"{_LOSSLESS}, host_budget of it in memory (arXiv 2303.06865)", None, True, {"stream": "host"}
    ),
    "dualblade": System(
        Full, f"{_LOSSLESS}, part of it in the page cache (arXiv 2604.26557)", None, True, {"stream": "dual"}
    ),
    "leoam": System(
        LeoAM, "chunk tree, abstracts and INT4 on the drive (arXiv 2506.20187)", LeoAMRun, settings={"compress": "auto"}
    ),
    "leoam-released": System(LeoAMReleased, "leoam's chunks as in its author's released code"),
    "quest-dense": System(QuestDense, "quest with the first two layers dense, as in its paper"),
    "instattention": System(
        Full,
        "exact attention inside the emulated drive (arXiv 2409.04992)",
        AttendingRun,
        needs_drive=True,
        fixed={"drive_kind": "emulated"},
    ),
}


def list_systems() -> dict[str, System]:
    """Every system by name: policies and named systems. Built on each call, to include newly registered policies."""
    return {name: System(policy, inspect.getdoc(policy).splitlines()[0]) for name, policy in POLICIES.items()} | SYSTEMS


def find_system(name: str, options: dict) -> tuple[System, Settings]:
    """The system of that name and its settings. UsageError for an unknown name, a missing drive or a wrong option."""
    known = list_systems()
    if name not in known:
        raise UsageError(f"no system '{name}'; choose one of {', '.join(known)}")
    system = known[name]
    settings = Settings(**(system.settings | options | system.fixed))
    if system.needs_drive and settings.drive is None:
        raise UsageError(f"{name} keeps KV on a drive: name a folder for it (--drive PATH, drive=...)")
    (system.run or run_for(settings)).check_settings(settings)
    return system, settings


def run_for(settings: Settings) -> type[Run]:
    """The run class for these settings, independent of the policy."""
    if settings.stream is not None:
        return StreamedRun
    if settings.drive is None:
        return Run
    if settings.drive_kind != "ssd":
        return ScoringRun
    return LeoAMRun if settings.compress else Run


def options_of(system: str, options: dict) -> dict:
    """The options of one system in a comparison: `full` is the reference and keeps all KV in memory."""
    return options | {"drive": None, "host_budget": None} if system == "full" else options


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile's, peft's or DataParallel's wrapper. UsageError if there is none."""
    inner = model
    while isinstance(inner, torch.nn.Module) and not isinstance(inner, PreTrainedModel):
        if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
            raise UsageError("prompt and prefix tuning bring KV of their own, which no tiered cache can hold")
        names = ("_orig_mod", "module", "base_model", "model")
        inner = next((part for name in names if (part := getattr(inner, name, None)) is not None), None)
    if not isinstance(inner, PreTrainedModel):
        raise UsageError(
            f"a {type(model).__name__} is no transformers model: load one (AutoModelForCausalLM.from_pretrained)"
        )
    return inner


def make_cache(
    model: PreTrainedModel | PretrainedConfig,
    system: str = "hillinfer",
    store: PrefixStore | str | Path | None = None,
    **options,
) -> TieredCache:
    """A cache for `generate`.

    model    a model, also within a wrapper; or its config, and then nothing looks ahead
    store    folder from which the known prefix of a prompt is opened, and in which new prompts are kept
    options  the fields of `Settings`
    """
    found, settings = find_system(system, options)
    run = found.run or run_for(settings)
    if isinstance(model, PretrainedConfig):
        if store is not None:
            raise UsageError("a store tells models by their weights: pass the model and not its config")
        return TieredCache(model, found.policy, settings, run=run)
    model = unwrap(model)
    cache = TieredCache(model.config, found.policy, settings, run=run)
    reads_records = settings.drive is not None and settings.stream is None and not cache.support.exact
    if settings.lookahead and reads_records:
        cache.attach(model)
    if store is not None:
        use_store(cache, model, store)
    return cache
