"""Long-context inference whose KV cache does not fit in memory."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hillinfer.cache import TieredCache
    from hillinfer.config import Settings
    from hillinfer.errors import DriveError, UsageError
    from hillinfer.evaluator.policy import Policy, Step
    from hillinfer.loading import load_model
    from hillinfer.models.seam import disable, enable
    from hillinfer.session import keep_session, open_session, save_session
    from hillinfer.speculative import exact
    from hillinfer.systems.registry import POLICIES, list_systems, make_cache
    from hillinfer.workbench.explain import explain

__version__ = "0.1.0"

_NAMES = {  # public names by their module
    "cache": "TieredCache",
    "config": "Settings",
    "errors": "DriveError UsageError",
    "evaluator.policy": "Policy Step",
    "loading": "load_model",
    "models.seam": "disable enable",
    "session": "keep_session open_session save_session",
    "speculative": "exact",
    "systems.registry": "POLICIES list_systems make_cache",
    "workbench.explain": "explain",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Public names load on first use: `hillinfer --help` and a wrong option need no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'hillinfer' has no attribute '{name}'")
    return getattr(import_module(f"hillinfer.{_HOME[name]}"), name)
