"""The terminal: consoles, one-line errors, tables and progress, as bars or (into a file) as plain lines."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hillinfer.errors import UsageError

out, err = Console(), Console(stderr=True)
WIDTH = 200  # columns at which table cells fold; a narrower terminal wraps lines, and nothing is cut
LINE_S, IDLE_LINES = 3.0, 20  # seconds between plain lines of progress; how many are left out while nothing moves


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


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress bars on stderr that disappear when done. Where stderr is no terminal, plain lines instead."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    columns += TimeElapsedColumn(), TimeRemainingColumn()

    def line() -> str:
        return ", ".join(f"{task.description} {task.completed:,.0f}/{task.total:,.0f}" for task in bars.tasks)

    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars, _lines(line):
        yield bars


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Say on stderr what is being done, as `progress` does. Call the result with what is done next."""
    with err.status(Text(text), refresh_per_second=4) as status, _lines(lambda: str(status.status)):
        yield lambda text: status.update(Text(text))


@contextmanager
def _lines(text: Callable[[], str]) -> Iterator[None]:
    """Where stderr is no terminal, print `text()` now and then: while it changes, and now and again while not."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        last, idle = "", 0
        while not done.wait(LINE_S):
            idle = idle + 1 if (now := text()) == last else 0
            if idle % IDLE_LINES == 0:
                minutes, seconds = divmod(int(time.monotonic() - start), 60)
                say(f"{now}, {minutes}:{seconds:02} elapsed", to=err)
            last = now

    teller = threading.Thread(target=tell, name="hillinfer-progress", daemon=True)
    if not err.is_terminal:
        teller.start()
    try:
        yield
    finally:
        done.set()
        if teller.ident is not None:
            teller.join()


def split_list(text: str, kind: Callable = str) -> list:
    """The items of `a, b`, each as `kind`; at least one. UsageError if an item is no such number."""
    try:
        return [kind(item.strip()) for item in text.split(",") if item.strip()] or [kind(text)]
    except ValueError:
        raise UsageError(f"'{text}' is not a list of numbers; separate them with commas, as in 0.1,0.2") from None
