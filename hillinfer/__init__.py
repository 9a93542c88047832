"""Long-context inference whose KV cache does not fit in memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hillinfer.cache import TieredCache, disable, enable
    from hillinfer.config import Settings, UsageError
    from hillinfer.evaluator.policies import POLICIES
    from hillinfer.evaluator.policy import Policy, Step
    from hillinfer.session import keep_session, open_session, save_session
    from hillinfer.systems import list_systems, make_cache
    from hillinfer.tiers.drive import DriveError

__version__ = "0.1.0"

_HOME = {
    "TieredCache": "cache",
    "disable": "cache",
    "enable": "cache",
    "Settings": "config",
    "UsageError": "config",
    "POLICIES": "evaluator.policies",
    "Policy": "evaluator.policy",
    "Step": "evaluator.policy",
    "keep_session": "session",
    "open_session": "session",
    "save_session": "session",
    "make_cache": "systems",
    "list_systems": "systems",
    "DriveError": "tiers.drive",
}
__all__ = [
    "POLICIES",
    "DriveError",
    "Policy",
    "Settings",
    "Step",
    "TieredCache",
    "UsageError",
    "disable",
    "enable",
    "keep_session",
    "list_systems",
    "make_cache",
    "open_session",
    "save_session",
]


def __getattr__(name: str):
    """Public names load on first use: `hillinfer --help` and a wrong option need no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'hillinfer' has no attribute '{name}'")
    return getattr(import_module(f"hillinfer.{_HOME[name]}"), name)
