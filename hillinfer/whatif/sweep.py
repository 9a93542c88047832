"""Many what-ifs at once: every combination as one modelled cell, in a table; over cores or machines with joblib."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import joblib
import pandas as pd

from hillinfer import files
from hillinfer.config import parse_bytes
from hillinfer.errors import UsageError
from hillinfer.systems.shapes import find_shape
from hillinfer.timeline import Timeline
from hillinfer.whatif import modelled, recording, replay, work
from hillinfer.whatif.case import Case, DoesNotFit
from hillinfer.whatif.devices import Profile, find_profile

RECORDED = "recorded"  # the system of a cell that replays a run instead of a rule


@dataclass(frozen=True)
class Cell:
    profile: str
    model: str
    system: str
    context: int
    batch: int = 1
    alpha: float = 0.2
    host: float | None = None  # bytes of host memory that may hold KV (M0)


def parse_sizes(text: str) -> list[int]:
    """`4096`, `4k,16k` or `4k..128k`, which doubles from the first to the last; k is 1,024."""
    out = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(k?)(?:\.\.(\d+)(k?))?\s*", part.lower())
        if not match or not int(match[1]):
            raise UsageError(f"'{part}' is no size; write 4096, 4k,16k or 4k..128k")
        first = int(match[1]) * (1024 if match[2] else 1)
        last = int(match[3]) * (1024 if match[4] else 1) if match[3] else first
        if last < first:
            raise UsageError(f"'{part}' runs backwards; write the smaller size first")
        while first <= last:
            out.append(first)
            first *= 2
    return out


def list_of(text: str, kind: Callable = str) -> list:
    """The parts of `a,b`, each as `kind`."""
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"'{text}' is no list of numbers; write them with commas between") from None


def cells(
    profiles: Sequence[str],
    models: Sequence[str],
    systems: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int] = (1,),
    alphas: Sequence[float] = (0.2,),
    hosts: Sequence[str | int | None] = (None,),
) -> list[Cell]:
    """Every combination. UsageError for a name or number that cannot be, before any work."""
    systems = list(work.RULES) if list(systems) == ["all"] else list(systems)
    for name in systems:
        if name not in work.RULES and name != RECORDED:
            raise UsageError(f"no rule for a system '{name}'; choose all, or some of {', '.join(work.RULES)}")
    for name in models:
        find_shape(name)
    for name in profiles:
        find_profile(name)
    for alpha in alphas:
        if not 0 < alpha <= 1:
            raise UsageError(f"alpha is {alpha}, but it is a share of the tokens: choose one above 0 and up to 1")
    hosts = [parse_bytes(host) for host in hosts]
    return [Cell(*each) for each in product(profiles, models, systems, contexts, batches, alphas, hosts)]


def evaluate(cell: Cell, profile: Profile | None = None, run: Timeline | None = None) -> dict:
    """One row: the cell, its modelled milliseconds for a step, each lane's, and what bounds it."""
    profile = profile or find_profile(cell.profile)
    row = {field.name: getattr(cell, field.name) for field in fields(cell)}
    row |= {"ms": math.nan, "tokens/s": math.nan, "drive GB": math.nan, "bound": "", "note": ""}
    shape = find_shape(cell.model)
    try:
        if cell.system == RECORDED:
            target = replay.Target(shape, cell.context, cell.batch, cell.alpha)
            line = replay.replay(run, profile, target, most=2)
        else:
            case = Case(profile, shape, cell.context, cell.batch, cell.alpha, cell.host)
            line = modelled.timeline(case, cell.system)
    except (DoesNotFit, KeyError) as error:  # a profile that lacks a part says which
        return row | {"note": f"does not fit: {error.args[0]}"}
    took, final = replay.modelled_seconds(line)[-1], max(span.step for span in line.spans)
    last, busy = [span for span in line.spans if span.step == final], defaultdict(float)
    for span in last:
        busy[span.lane] += (span.end_ns - span.start_ns) / 1e6
    drive = sum(span.bytes for span in last if span.kind in ("read", "prefetch", "mapped", "scan"))
    row |= {"ms": took * 1e3, "tokens/s": cell.batch / took, "drive GB": drive / 1e9}
    row |= {f"{lane} ms": ms for lane, ms in sorted(busy.items())}
    return row | {"bound": max(busy, key=busy.get), "note": line.source}


def sweep(
    wanted: Sequence[Cell],
    jobs: int = -1,
    run: Timeline | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> pd.DataFrame:
    """A row for each cell, in order. `done(count)` is called as rows arrive.

    Where the work runs is joblib's: this machine's cores by default, and any cluster inside
    `joblib.parallel_config(backend="dask")` or `"ray"` (docs/replay.md). UsageError for cells of a run without one.
    """
    if not jobs:
        raise UsageError("no sweep with 0 jobs: choose 1 or more, or -1 for one on each core")
    if run is None and any(cell.system == RECORDED for cell in wanted):
        raise UsageError("a recorded run is to be replayed, but none was given: name its trace with --run")
    own = {name: find_profile(name) for name in {cell.profile for cell in wanted}}
    size = max(1, min(16, len(wanted) // 8))  # cells of one task: a cell alone is too small to send
    groups = [wanted[at : at + size] for at in range(0, len(wanted), size)]
    rows: list[dict] = []
    pool = joblib.Parallel(n_jobs=jobs, return_as="generator")
    for group in pool(joblib.delayed(_rows)(group, own, run) for group in groups):
        rows += group
        done(len(rows))
    return pd.DataFrame(rows)


def _rows(group: Iterable[Cell], profiles: dict[str, Profile], run: Timeline | None) -> list[dict]:
    return [evaluate(cell, profiles[cell.profile], run) for cell in group]


def load_run(path: Path) -> Timeline:
    """A trace of `hillinfer run --trace`. UsageError for another file."""
    try:
        timeline = Timeline.load(path)
        recording.recorded(timeline)
        recording.decode_steps(timeline)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}; record a run with: hillinfer run ... --trace {path}") from None
    return timeline


def save(frame: pd.DataFrame, folder: Path) -> Path:
    """The table as CSV, written whole or not at all."""
    return files.write_text(folder / "replay.csv", frame.to_csv(index=False))
