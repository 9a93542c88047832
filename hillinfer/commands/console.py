"""The terminal: consoles, one-line errors, tables and progress bars."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hillinfer.errors import UsageError

out, err = Console(), Console(stderr=True)
WIDTH = 200  # columns at which table cells fold; a narrower terminal wraps lines, and nothing is cut


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print an error as one line and exit: with 2 for a usage error, 1 for a drive error, 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped; the drive's space is free again")
        raise typer.Exit(130) from None
    except (UsageError, OSError) as error:
        err.print(Text.assemble(("error:", "red"), " ", str(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None


def say(*lines: str, to: Console = out) -> None:
    """Print lines as they are: no markup, no colours, no breaks."""
    for line in lines:
        to.print(line, markup=False, highlight=False, soft_wrap=True)


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table, its first column left-aligned and the others right-aligned."""
    table = Table(title=title and Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=max(out.width, WIDTH)).print(table)


def progress() -> Progress:
    """A progress bar on stderr that disappears when done; use it in a `with` block."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, transient=True)


def split_list(text: str, kind: Callable = str) -> list:
    """The items of `a, b`, each as `kind`; at least one. UsageError if an item is no such number."""
    try:
        return [kind(item.strip()) for item in text.split(",") if item.strip()] or [kind(text)]
    except ValueError:
        raise UsageError(f"'{text}' is not a list of numbers; separate them with commas, as in 0.1,0.2") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. UsageError if it is unreadable or blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({error}); give a UTF-8 text file") from None
    if not text.strip():
        raise UsageError(f"{path} is empty; put the text in it")
    return text
