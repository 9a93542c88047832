"""A kernel's interrupt stops runs that go on in threads. The only file that knows Jupyter's kernel.

A KeyboardInterrupt reaches the main thread alone: in a cell that runs it ends the cell; between cells the kernel
ignores the signal. Both are told to the runs here.
"""

import signal
import threading
import weakref
from collections.abc import Callable

_watched: "weakref.WeakSet" = weakref.WeakSet()  # what has a `stop`
_wired = False


def where_shown() -> str:
    """The notebook cell that is being executed, or one name for all other places."""
    try:
        from IPython import get_ipython

        return get_ipython().get_parent()["metadata"]["cellId"]
    except (ImportError, AttributeError, KeyError, TypeError):
        return "here"


def stop_at_interrupt(workbench) -> None:
    """From now on an interrupt of the kernel calls `workbench.stop()`. Outside a kernel this does nothing."""
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
    """Between cells the kernel has SIGINT ignored, and puts back around each cell what it finds: put ours there."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: _stop_all())
    elif tries:
        call_later(0.2, _wire_idle, call_later, tries - 1)


def _stop_all() -> None:
    for workbench in list(_watched):
        workbench.stop()
