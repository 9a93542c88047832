"""Raw and code lines of the package by folder and module: `make size`. Code: neither blank, comment nor docstring."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hillinfer"
# The core shared by all systems: ground floor, cache, tiers, selection and pipeline, without the papers' systems and
# without what models need (`models`).
CORE = ("__init__", "__main__", "assets", "attention", "cache", "config", "errors", "files", "growable", "heads")
CORE += ("layer", "run", "timeline", "evaluator", "native", "pipeline", "tiers")
APART = ("workbench", "longbench")  # not counted in the package's size


def lines(path: Path) -> tuple[int, int]:
    """Raw and code lines of one module."""
    text = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    rows = [row.strip() for row in text.splitlines()]
    return len(rows), sum(bool(row) and row[0] != "#" and i not in docstrings for i, row in enumerate(rows, 1))


def modules() -> dict[Path, tuple[int, int]]:
    """Maps each module, relative to the package, to its raw and code lines."""
    return {path.relative_to(PACKAGE): lines(path) for path in sorted(PACKAGE.rglob("*.py"))}


def home(path: Path) -> str:
    """The folder or root module that a module belongs to: `tiers`, `cache`."""
    return path.parts[0].removesuffix(".py")


def total(counted: dict[Path, tuple[int, int]], homes) -> tuple[int, int]:
    raw, code = zip(*(n for path, n in counted.items() if home(path) in homes), strict=True)
    return sum(raw), sum(code)


def main() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    counted, table = modules(), Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("module", "left"), ("raw", "right"), ("code", "right")):
        table.add_column(name, justify=justify)
    for folder in sorted({path.parent for path in counted}):
        members = {path: n for path, n in counted.items() if path.parent == folder}
        for path, (raw, code) in members.items():
            table.add_row(str(path), f"{raw:,}", f"{code:,}")
        table.add_row(f"{folder}/", *(f"{sum(n):,}" for n in zip(*members.values(), strict=True)), style="bold")
    homes = {home(path) for path in counted}
    for name, part in (("core", CORE), ("without workbench and longbench", homes - set(APART)), ("all", homes)):
        table.add_row(name, *(f"{n:,}" for n in total(counted, part)), style="bold")
    Console().print(table)


if __name__ == "__main__":
    main()
