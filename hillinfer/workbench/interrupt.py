"""Stop background runs when the kernel is interrupted. The only module that depends on Jupyter's kernel.

A KeyboardInterrupt reaches only the main thread: it ends a running cell, and between cells the kernel ignores the
signal. This module forwards both cases to the runs.
"""

import signal
import threading
import weakref
from collections.abc import Callable

_watched: "weakref.WeakSet" = weakref.WeakSet()  # objects with a `stop` method
_wired = False


def current_cell() -> str | None:
    """Id of the notebook cell being executed; None where the front end sends none (Colab, a plain console)."""
    try:
        from IPython import get_ipython

        return get_ipython().get_parent()["metadata"]["cellId"]
    except (ImportError, AttributeError, KeyError, TypeError):
        return None


def stop_on_interrupt(workbench) -> None:
    """Call `workbench.stop()` on every later interrupt of the kernel. No effect outside a kernel."""
    global _wired
    _watched.add(workbench)
    try:
        from IPython import get_ipython

        shell = get_ipython()
        loop = shell.kernel.io_loop
    except (ImportError, AttributeError):
        return
    if not _wired:
        _wired = True
        shell.events.register("post_run_cell", _after_cell)
        loop.add_callback(_wire_idle, loop.call_later)


def _after_cell(result) -> None:
    if isinstance(result.error_in_exec, KeyboardInterrupt):
        _stop_all()


def _wire_idle(call_later: Callable, tries: int = 50) -> None:
    """Install the handler for interrupts between cells.

    There the kernel ignores SIGINT, and after each cell it restores the handler found before it, so ours persists.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: _stop_all())
    elif tries:
        call_later(0.2, _wire_idle, call_later, tries - 1)


def _stop_all() -> None:
    for workbench in list(_watched):
        workbench.stop()
