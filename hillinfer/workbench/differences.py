"""The figures of two runs side by side, as rows or as an HTML table."""

from html import escape

from hillinfer.longbench.runner import in_memory
from hillinfer.workbench.live import LiveRun

STYLE = "border-collapse:collapse;font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums"
CELL = "padding:2px 14px;text-align:right;border-bottom:1px solid #8886"


def compare_figures(one: LiveRun, other: LiveRun) -> list[tuple[str, float, float, str]]:
    """Measured figures of two finished runs: (name with unit, first, second, format)."""
    rows = [
        ("decode, ms/token", "ms_per_token", ",.1f"),
        ("prefill, ms", "prefill_ms", ",.0f"),
        ("decode steps", "steps", ",.0f"),
        ("attended tokens per step and layer", "attended", ",.0f"),
        ("tokens in the context", "cached", ",.0f"),
        ("from the drive, bytes/token", "drive_bytes_per_token", ",.0f"),
        ("overlap of compute and transfer", "overlap", ".0%"),
    ]
    found = [(text, one.figures[name], other.figures[name], form) for text, name, form in rows]
    for tier in ("device", "host", "drive"):
        found.append((f"served by {tier}", one.figures["rates"][tier], other.figures["rates"][tier], ".0%"))
    memory = [in_memory(run.figures["memory"]) for run in (one, other)]
    found.append(("in memory at the end, bytes", *memory, ",.0f"))
    return found


def first_difference(one: LiveRun, other: LiveRun) -> str:
    """The position of the first token in which two answers differ, as a sentence."""
    texts = [[token.text for token in run.tokens if not token.asked] for run in (one, other)]
    if texts[0] == texts[1]:
        return "the answers are identical, token for token"
    part = next((i for i, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1), min(map(len, texts)))
    return f"the answers differ from token {part + 1} on"


def differences(one: LiveRun, other: LiveRun) -> str:
    """The comparison of two runs as an HTML table."""
    rows = []
    for text, first, second, form in compare_figures(one, other):
        change = (
            f"{100 * (second - first):+.0f} points" if form == ".0%" else f"{second / first:.2f} x" if first else "-"
        )
        cells = "".join(f"<td style='{CELL}'>{cell}</td>" for cell in (f"{first:{form}}", f"{second:{form}}", change))
        rows.append(f"<tr><th scope=row style='{CELL};text-align:left;font-weight:400'>{escape(text)}</th>{cells}</tr>")
    judged = [{True: "right", False: "wrong", None: "not scored"}[run.right] for run in (one, other)]
    names = [
        f"{run.system}, alpha {run.options['alpha']:g} ({word})" for run, word in zip((one, other), judged, strict=True)
    ]
    head = "".join(f"<th scope=col style='{CELL}'>{escape(name)}</th>" for name in ("", *names, "second vs. first"))
    note = first_difference(one, other) if one.case == other.case else "the runs have different prompts"
    caption = f"<caption style='text-align:left;padding:4px 14px'>Measured; {escape(note)}</caption>"
    return f"<table class='hi-differences' style='{STYLE}'>{caption}<tr>{head}</tr>{''.join(rows)}</table>"
