"""`hillinfer lab`: the notebooks."""

from pathlib import Path
from typing import Annotated

import typer


def lab(
    folder: Annotated[Path | None, typer.Argument(help="Folder of the notebooks; by default the clone's.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8888,
):
    """Open the notebooks in JupyterLab, on this machine only and protected by a token."""
    from hillinfer.workbench.lab import open_lab

    open_lab(folder, browser, port)
