"""What a run needs of the host's memory, estimated before it starts, against what limit and machine leave it."""

from pathlib import Path

from hillinfer.config import UsageError
from hillinfer.tiers.planner import read_memory

MIB = 1 << 20
LIBRARIES = 320 * MIB  # anonymous memory of torch and transformers once imported, before any model (275 measured)
AT_WORK = 80 * MIB  # what they take beside tensors while a model runs: code loaded late, threads, the allocator's own
WORKER = 100 * MIB  # an emulated drive's process, without its codes
BEHIND = 64 * MIB  # bytes that may wait to be written, as in `tiers.stream`, which loads torch
PART = 512  # tokens of KV that a prefill chunk attends to at once, as in `tiers.store`


def check_libraries(root: Path = Path("/")) -> None:
    """UsageError where even the libraries would not fit; before they are imported."""
    refuse({"torch and transformers": LIBRARIES + AT_WORK}, "use a machine or container with more", root)


def needs(run, shape, tokens: int, chunk: int | None = None, weights: int = 0) -> dict[str, int]:
    """Bytes of host memory by part, from above.

    run     `pipeline.run.Run` with settings and geometry
    shape   `pipeline.shapes.ModelShape` of the model; None for the KV alone
    tokens  of each sequence in all, prefilled `chunk` at once
    """
    settings, size = run.settings, run.geometry
    batch, record = size.batch, run.layers * size.batch * size.record_bytes  # one token, all layers
    streams = settings.stream is not None  # which attends to everything: it scores nothing, and keeps no codes
    codes = 0 if streams else run.layers * batch * tokens * size.kv_heads * size.head_dim
    rows = batch * min(tokens, chunk or tokens)
    dense, on_gpu = 0, size.device.type != "cpu"
    if shape is not None and not on_gpu:
        dense = 4 * rows * (6 * shape.hidden + 3 * shape.inner + 8 * shape.heads * shape.head_dim)
        dense += 6 * rows * min(PART, tokens) * shape.heads if settings.drive is not None else 0
    if settings.drive is None:
        resident = on_gpu and settings.host_budget is None
        kv = 0 if resident else tokens * record * 9 // 8 + tokens * record // run.layers  # a layer is copied to grow
    elif streams:
        near = 0 if settings.stream != "host" else min(settings.host_budget or 0, tokens * record)
        kv = near + 2 * tokens * record // run.layers + min(BEHIND, tokens * record)  # two layers' slots, writes
    else:
        behind = BEHIND if settings.host_budget is None else min(BEHIND, settings.host_budget // 4)
        kv = run.pool_tokens(tokens) * record + 2 * min(behind, tokens * record)
    parts = {
        "weights": weights,
        "KV in memory": kv,
        "codes and index": 3 * codes,  # codes and, of some policies, bounds beside them; an eighth for growth
        f"prefill of {rows:,} tokens at once": dense,
        "libraries at work": AT_WORK,
    }
    if settings.drive_kind == "emulated":
        parts["the emulated drive"] = WORKER + codes + 2 * min(BEHIND, tokens * record)
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def refuse(parts: dict[str, int], fix: str, root: Path = Path("/")) -> None:
    """UsageError, with the arithmetic, where the sum of these parts is more than is left."""
    try:
        memory, need = read_memory(root), sum(parts.values())
    except (OSError, KeyError):
        return  # no Linux: nothing is known
    if need <= memory.budget():
        return
    held = memory.anonymous + memory.shmem
    less = f", less {_mib(held)} in use" if held else ""
    listed = " + ".join(f"{name} {_mib(nbytes)}" for name, nbytes in parts.items())
    raise UsageError(
        f"this run needs about {_mib(need)} of host memory ({listed}), but {memory.source} has {_mib(memory.limit)}"
        f"{less}: {fix}"
    )


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // MIB):,} MiB"


FIX = "prefill in smaller chunks, lower host_budget or alpha, keep the KV on a drive, or raise the limit"
