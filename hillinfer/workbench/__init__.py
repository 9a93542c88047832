"""Visualisation: figures, the board and the dashboard. The only package that imports plotly and ipywidgets."""

from importlib import import_module

_HOME = {
    "AccuracyBoard": "accuracy",
    "AttentionMap": "pyramid",
    "AttentionView": "attention",
    "show_attention": "attention",
    "Workbench": "dashboard",
    "Board": "board",
    "show_runs": "overlay",
    "show_timeline": "board",
    "show_record": "board",
    "Case": "cases",
    "LiveRun": "live",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Import on first use: the figures of `hillinfer demo` work without ipywidgets."""
    if name not in _HOME:
        raise AttributeError(f"module 'hillinfer.workbench' has no attribute '{name}'")
    try:
        return getattr(import_module(f"hillinfer.workbench.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("anywidget", "ipywidgets", "traitlets"):
            raise
        raise ImportError(f"{name} needs {error.name}: pip install 'hillinfer[lab]'", name=error.name) from None
