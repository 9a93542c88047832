"""Write a comparison as one self-contained HTML page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from hillinfer import files

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .35em .8em; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th:first-child { text-align: left } .facts { color: #555 }
"""


def write_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Sequence[go.Figure],
) -> Path:
    """Write the page with plotly embedded, so it opens without a network. All text is escaped."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p class=facts>{escape(fact)}</p>" for fact in facts),
        "<table><thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr></thead><tbody>",
        *("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows),
        "</tbody></table>",
        *(figure.to_html(full_html=False, include_plotlyjs=i == 0) for i, figure in enumerate(figures)),
        "</html>",
    ]
    return files.write_text(path, "\n".join(parts))


def format_rows(frame: pd.DataFrame, **formats: str) -> list[list[str]]:
    """The cells of a frame as text. `formats` maps columns to format strings; a missing number is `-`."""

    def text(name: str, cell) -> str:
        style = formats.get(name, "{:g}" if isinstance(cell, float) else "{}")
        return "-" if cell != cell else style.format(cell)

    return [[text(*pair) for pair in zip(frame, row, strict=True)] for row in frame.itertuples(index=False)]
