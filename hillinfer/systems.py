"""The named systems: each a policy and what it needs of the tiers. A policy without an entry here is a system by
itself.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from hillinfer.cache import TieredCache, enable
from hillinfer.config import Settings, UsageError
from hillinfer.evaluator.policies import POLICIES, TopK
from hillinfer.evaluator.policy import Policy


@dataclass(frozen=True)
class System:
    """policy and, in one line, what makes the system that system."""

    policy: type[Policy]
    about: str
    needs_drive: bool = False


COMPOSED = {
    "hillinfer": System(
        TopK, "hot pool by hit table in host memory, cold pool on the drive (arXiv 2602.18750)", needs_drive=True
    ),
}


def list_systems() -> dict[str, System]:
    """Every system by name: each policy, and the compositions. Read at the time of the call, so that new policies are
    in it.
    """
    return {name: System(policy, (policy.__doc__ or "").strip()) for name, policy in POLICIES.items()} | COMPOSED


def find_system(name: str, settings: Settings) -> System:
    """The system of that name; UsageError where there is none or it lacks a drive."""
    known = list_systems()
    if name not in known:
        raise UsageError(f"no system '{name}'; choose one of {', '.join(known)}")
    if known[name].needs_drive and settings.drive is None:
        raise UsageError(f"{name} keeps its cold pool on a drive: name a folder for it (--drive PATH, drive=...)")
    return known[name]


def make_cache(model: PreTrainedModel | PretrainedConfig, system: str = "hillinfer", **options) -> TieredCache:
    """A cache for `generate`, and the model switched to tiered attention.

    model    a model, which is switched over; or its config, and then nothing looks ahead
    options  the fields of `Settings`
    """
    settings = Settings(**options)
    policy = find_system(system, settings).policy
    if not isinstance(model, PreTrainedModel):
        return TieredCache(model, policy, settings)
    enable(model)
    cache = TieredCache(model.config, policy, settings)
    if settings.lookahead and settings.drive is not None:
        cache.attach(model)
    return cache
