"""`hillinfer systems`: the systems by name."""

from rich.markup import escape
from rich.table import Table

from hillinfer.commands.console import out


def systems():
    """List the systems that the other commands accept."""
    from hillinfer.systems.registry import list_systems

    table = Table(box=None, show_header=False)
    for name, system in list_systems().items():
        table.add_row(escape(name), escape(system.about) + (" [dim](needs --drive)[/]" if system.needs_drive else ""))
    out.print(table)
