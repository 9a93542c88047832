"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

DTYPES = ("auto", "float32", "bfloat16", "float16")

Alpha = Annotated[float, typer.Option(help="Fraction of the cached tokens that a decode step attends to, in (0, 1].")]
HostBudget = Annotated[str | None, typer.Option(help="Host memory for KV, such as 64MiB; by default 2*alpha of it.")]
Drive = Annotated[Path | None, typer.Option(help="Folder on the drive; by default one under --out.")]
DriveKind = Annotated[str, typer.Option(help="ssd, xrt (a SmartSSD) or emulated (a SmartSSD in software).")]
Precision = Annotated[str, typer.Option(help="Precision of the key codes: int8, int4 or int2.")]
Dtype = Annotated[str, typer.Option(help=f"Precision of the model: {', '.join(DTYPES)}.")]
PrefillChunk = Annotated[int | None, typer.Option(min=2, help="Tokens per prefill chunk; smaller takes less memory.")]
