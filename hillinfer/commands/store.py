"""`hillinfer store`: what a prefix store holds, whether it is whole, and less of it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import clear_errors, say, show_table
from hillinfer.errors import UsageError

Folder = Annotated[Path, typer.Argument(help="Folder of the store.")]
app = typer.Typer(no_args_is_help=True, help="List, verify or prune a store of prompts' KV (`run --store`).")


def opened(folder: Path):
    """The store, without a limit. UsageError if there is none."""
    from hillinfer.prefix_store.blocks import PrefixStore

    if not folder.expanduser().is_dir():
        raise UsageError(f"there is no store {folder}; name the folder that `run --store` was given")
    return PrefixStore(folder, quota=None)


@app.command("list")
@clear_errors()
def show(folder: Folder):
    """The models whose blocks a store holds, the most recently used first."""
    from hillinfer.prefix_store.reading import about

    models: dict[str, list] = {}
    for block in opened(folder).blocks():
        models.setdefault(block.model, []).append(block)
    rows = []
    for blocks in models.values():
        family, dtype, tokens = about(blocks[0].path)
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(blocks[0].used_ns / 1e9))
        sizes = f"{len(blocks):,}", f"{len(blocks) * tokens:,}", f"{sum(b.nbytes for b in blocks) / 2**20:,.0f}"
        rows.append((f"{family} {dtype} ({blocks[0].model})", *sizes, used))
    show_table(["model", "blocks", "tokens", "MiB", "last used"], rows)


@app.command()
@clear_errors()
def verify(folder: Folder):
    """Read every block, and remove those that are damaged: they will be computed again."""
    from hillinfer.prefix_store.reading import check

    whole, damaged = 0, 0
    for block in opened(folder).blocks():
        if why := check(block.path):
            block.path.unlink(missing_ok=True)
            say(f"removed: {why}")
        whole, damaged = whole + (not why), damaged + bool(why)
    say(f"{whole:,} blocks are whole, {damaged:,} were damaged")


@app.command()
@clear_errors()
def prune(
    folder: Folder,
    quota: Annotated[str, typer.Option(help="Bytes that may remain, such as 4GiB; 0 empties the store.")] = "0",
):
    """Remove the least recently used blocks until the rest takes no more than the quota."""
    from hillinfer.config import parse_bytes

    store = opened(folder)
    before, kept = sum(block.nbytes for block in store.blocks()), store.prune(parse_bytes(quota))
    say(f"removed {before - kept:,} bytes; {kept:,} remain")
