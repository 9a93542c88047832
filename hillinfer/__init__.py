"""Long-context inference whose KV cache does not fit in memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hillinfer.cache import TieredCache
    from hillinfer.config import Settings
    from hillinfer.errors import DriveError, UsageError
    from hillinfer.evaluator.policies import POLICIES
    from hillinfer.evaluator.policy import Policy, Step
    from hillinfer.seam import disable, enable
    from hillinfer.session import keep_session, open_session, save_session
    from hillinfer.systems.registry import list_systems, make_cache

__version__ = "0.1.0"

_HOME = {
    "TieredCache": "cache",
    "disable": "seam",
    "enable": "seam",
    "Settings": "config",
    "UsageError": "errors",
    "POLICIES": "evaluator.policies",
    "Policy": "evaluator.policy",
    "Step": "evaluator.policy",
    "keep_session": "session",
    "open_session": "session",
    "save_session": "session",
    "make_cache": "systems.registry",
    "list_systems": "systems.registry",
    "DriveError": "errors",
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
