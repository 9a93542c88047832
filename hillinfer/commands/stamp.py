"""`hillinfer stamp`: permission to write KV to a raw block device."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import say


def stamp(device: Annotated[Path, typer.Argument(help="An empty block device, such as /dev/nvme1n1.")]):
    """Mark an empty block device for hillinfer, so that dualblade and flexgen may write KV to it."""
    from hillinfer.systems.lossless import raw_device

    raw_device.stamp(device)
    say(f"{device} is marked: use it with --device {device}")
