"""The named systems: each a policy and what it needs of the tiers. A policy without an entry here is a system by
itself.
"""

from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig, PreTrainedModel

from hillinfer.cache import TieredCache
from hillinfer.config import Settings
from hillinfer.errors import UsageError
from hillinfer.evaluator.policies import POLICIES, Full, InstAttention, LeoAM, TopK
from hillinfer.evaluator.policy import Policy
from hillinfer.seam import enable


@dataclass(frozen=True)
class System:
    """A policy, in one line what makes the system that system, and its own values of `Settings`."""

    policy: type[Policy]
    about: str
    needs_drive: bool = False
    drive_kind: str | None = None  # the only one that it runs on
    own: dict = field(default_factory=dict)


COMPOSED = {
    "lru": System(TopK, "hillinfer with a least-recently-used hot pool: the control", True, own={"placement": "lru"}),
    "hillinfer": System(
        TopK, "hot pool by hit counters in host memory, cold pool on the drive (arXiv 2602.18750)", needs_drive=True
    ),
    "flexgen": System(
        Full,
        "lossless: all KV streamed from the drive at each step, the next layer prefetched; host_budget of it stays in "
        "memory (arXiv 2303.06865)",
        True,
        own={"stream": "host"},
    ),
    "dualblade": System(
        Full,
        "lossless: the first K and V tensors in the page cache as far as memory allows, the rest on a direct path "
        "(arXiv 2604.26557)",
        True,
        own={"stream": "dual"},
    ),
    "leoam": System(
        LeoAM, "chunk tree, abstracts and INT4 on the drive (arXiv 2506.20187)", False, "ssd", {"compress": "auto"}
    ),
    "instattention": System(
        InstAttention, "exact attention inside the emulated drive (arXiv 2409.04992)", True, "emulated"
    ),
}


def list_systems() -> dict[str, System]:
    """Every system by name: each policy, and the compositions. Read at the time of the call, so that new policies are
    in it.
    """
    return {
        name: System(policy, (policy.__doc__ or "").strip().split("\n")[0]) for name, policy in POLICIES.items()
    } | COMPOSED


def find_system(name: str, options: dict) -> tuple[System, Settings]:
    """The system of that name and its settings. UsageError for an unknown name, a missing drive or a wrong option."""
    known = list_systems()
    if name not in known:
        raise UsageError(f"no system '{name}'; choose one of {', '.join(known)}")
    system = known[name]
    settings = Settings(**(system.own | options))
    if system.drive_kind == "emulated":
        settings = replace(settings, drive_kind="emulated")
    elif system.drive_kind and settings.drive_kind != system.drive_kind and settings.drive is not None:
        raise UsageError(f"{name} runs on {system.drive_kind} only: leave out --drive-kind {settings.drive_kind}")
    if system.needs_drive and settings.drive is None:
        raise UsageError(f"{name} keeps KV on a drive: name a folder for it (--drive PATH, drive=...)")
    return system, settings


def options_of(system: str, options: dict) -> dict:
    """The options of one system in a comparison: `full` is the reference and keeps all KV in memory."""
    return options | {"drive": None, "host_budget": None} if system == "full" else options


def make_cache(model: PreTrainedModel | PretrainedConfig, system: str = "hillinfer", **options) -> TieredCache:
    """A cache for `generate`, and the model switched to tiered attention.

    model    a model, which is switched over; or its config, and then nothing looks ahead
    options  the fields of `Settings`
    """
    found, settings = find_system(system, options)
    if not isinstance(model, PreTrainedModel):
        return TieredCache(model, found.policy, settings)
    enable(model)
    cache = TieredCache(model.config, found.policy, settings)
    if settings.lookahead and settings.drive is not None and settings.stream is None:
        cache.attach(model)
    return cache
