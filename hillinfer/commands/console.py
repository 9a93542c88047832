"""The terminal of all commands: two consoles, and how errors end a command."""

from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from hillinfer.errors import UsageError

out, err = Console(), Console(stderr=True)


@contextmanager
def clear_errors():
    """Usage errors end with code 2 and one line, drive errors with 1, Ctrl-C with 130."""
    try:
        yield
    except UsageError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print("stopped; the drive's space is free again")
        raise typer.Exit(130) from None
    except OSError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
