"""Write docs/api.md from the docstrings of the public names: `python docs/make_api.py`."""

import inspect
import sys
from importlib import import_module
from pathlib import Path

import hillinfer

OTHER = {  # module: its names that notebooks and how-to pages use
    "hillinfer.timeline": ["Timeline", "Counters", "Hits", "Span"],
    "hillinfer.prefix_store.blocks": ["PrefixStore"],
    "hillinfer.prefix_store.keeper": ["Keeper", "Report"],
    "hillinfer.workbench.observe": ["AttentionRecord", "AttentionSnapshot"],
    "hillinfer.workbench.pyramid": ["AttentionMap"],
    "hillinfer.workbench.attention": ["AttentionView", "show_attention"],
    "hillinfer.systems.hillinfer.profile": ["Profile", "Rate"],
    "hillinfer.whatif.devices": ["find_profile", "list_profiles"],
    "hillinfer.whatif.scenario": ["Scenario"],
    "hillinfer.whatif.modelled": ["seconds", "timeline"],
    "hillinfer.whatif.replay": ["replay", "Target"],
    "hillinfer.whatif.sweep": ["cells", "sweep"],
    "benchmarks.papers": [
        "headlines",
        "gains",
        "balance",
        "transfer_bound",
        "leoam_gains",
        "page_cache_collapse",
        "awkward_truth",
    ],
    "hillinfer.assets": ["load_embedded", "machine"],
    "hillinfer.longbench.comparison": ["demo_records", "compare", "compare_forced", "Result", "floor"],
    "hillinfer.longbench.forced": ["force_each", "Forced"],
    "hillinfer.longbench.needles": ["make_needles", "needle_prompt"],
    "hillinfer.longbench.runner": ["ask", "ask_each", "feed", "split_prompt", "Answer"],
    "hillinfer.longbench.synthetic": ["make_records", "load_records", "prompt_of"],
    "hillinfer.workbench.cases": ["Case"],
    "hillinfer.workbench.live": ["LiveRun"],
    "hillinfer.workbench.dashboard": ["Workbench"],
    "hillinfer.workbench.accuracy": ["AccuracyBoard"],
    "hillinfer.workbench.published": [
        "accuracy_by_budget",
        "accuracy_by_bytes",
        "fidelity_by_budget",
        "fidelity_by_bytes",
        "hits_by_pool",
        "sparsity_by_model",
    ],
    "hillinfer.workbench.vector": ["timeline_svg"],
    "hillinfer.workbench.board": ["Board", "show_timeline", "show_record"],
    "hillinfer.workbench.overlay": ["RunsChart", "show_runs"],
    "hillinfer.workbench.figures": [
        "timeline_figure",
        "hits_figure",
        "sparsity_figure",
        "attention_figure",
        "systems_figure",
        "tradeoff_figure",
    ],
}


def entry(module: str, name: str) -> str:
    """One name: signature, docstring, and the public methods and properties of a class."""
    thing = getattr(import_module(module), name)
    if not callable(thing):
        return f"### `{name}`\n\nA {type(thing).__name__}: {', '.join(f'`{key}`' for key in thing)}."
    text = f"### `{name}{signature(thing)}`\n\n{doc(thing)}"
    if inspect.isclass(thing):
        for key, value in vars(thing).items():
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            inner = value.fget if isinstance(value, property) else value
            if key.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__:
                continue
            head = key if isinstance(value, property) else f"{key}{signature(inner)}"
            text += f"\n\n- `{head}`\n\n" + "\n".join("  " + line if line else "" for line in doc(inner).split("\n"))
    return text


def signature(thing) -> str:
    try:
        own = inspect.signature(thing)
    except ValueError:
        return ""
    shown = [p.replace(annotation=p.empty) for p in own.parameters.values() if p.name not in ("self", "cls")]
    shown = [p.replace(default=...) if " at 0x" in str(p) or "<factory>" in str(p) else p for p in shown]
    return str(own.replace(parameters=shown, return_annotation=own.empty))


def doc(thing) -> str:
    """The docstring; its aligned lists of fields stay aligned."""
    text = inspect.cleandoc(thing.__doc__ or "")
    first, _, rest = text.partition("\n\n")
    return first + (f"\n\n```text\n{rest}\n```" if rest else "")


def page() -> str:
    parts = ["# API reference", "Made by `python docs/make_api.py` from the docstrings.", "## hillinfer"]
    parts += [entry("hillinfer", name) for name in hillinfer.__all__]
    for module, names in OTHER.items():
        parts += [f"## {module}", inspect.cleandoc(import_module(module).__doc__ or "")]
        parts += [entry(module, name) for name in names]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    path = Path(__file__).parent / "api.md"
    if "--check" in sys.argv:
        sys.exit(path.read_text() != page())
    path.write_text(page())
