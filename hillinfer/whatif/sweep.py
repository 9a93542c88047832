"""A sweep: every combination of settings as one modelled row of a table, in parallel processes."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import joblib
import pandas as pd

from hillinfer.config import Settings, parse_bytes
from hillinfer.errors import UsageError
from hillinfer.systems.hillinfer.profile import Profile
from hillinfer.systems.shapes import find_shape
from hillinfer.timeline import Timeline
from hillinfer.whatif import modelled, recording, replay
from hillinfer.whatif.devices import find_profile
from hillinfer.whatif.rules import RULES
from hillinfer.whatif.scenario import DoesNotFit, Scenario

RECORDED = "recorded"  # the system of a cell that replays a run instead of a rule


@dataclass(frozen=True)
class Cell:
    """One row of a sweep: a scenario and a system, by name."""

    profile: str
    model: str
    system: str
    context: int
    batch: int = 1
    alpha: float = 0.2
    host: float | None = None  # bytes of host memory for KV (M0)


def parse_sizes(text: str) -> list[int]:
    """`4096`, `4k,16k` or `4k..128k`, which doubles from the first to the last; k is 1,024."""
    out = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*0*[1-9]\d*k?(\.\.\d+k?)?\s*", part.lower()):
            raise UsageError(f"'{part}' is not a size; write 4096, 4k,16k or 4k..128k")
        ends = [int(end.replace("k", "")) * (1024 if "k" in end else 1) for end in part.lower().split("..")]
        if ends[-1] < ends[0]:
            raise UsageError(f"'{part}' runs backwards; write the smaller size first")
        out += [ends[0] << doublings for doublings in range((ends[-1] // ends[0]).bit_length())]
    return out


def cells(
    profiles: Sequence[str],
    models: Sequence[str],
    systems: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int] = (1,),
    alphas: Sequence[float] = (0.2,),
    hosts: Sequence[str | int | None] = (None,),
) -> list[Cell]:
    """Every combination. UsageError for an unknown name or an impossible number, before any work."""
    systems = list(RULES) if list(systems) == ["all"] else list(systems)
    for name in systems:
        if name not in RULES and name != RECORDED:
            raise UsageError(f"no rule for a system '{name}'; choose all, or some of {', '.join(RULES)}")
    for name in models:
        find_shape(name)
    for name in profiles:
        find_profile(name)
    for alpha in alphas:
        Settings(alpha=alpha)
    hosts = [parse_bytes(host) for host in hosts]
    return [Cell(*each) for each in product(profiles, models, systems, contexts, batches, alphas, hosts)]


def timeline(cell: Cell, profile: Profile | None = None, run: Timeline | None = None) -> Timeline:
    """The modelled timeline of a cell, by its system's rule or from the recorded `run`. Raises DoesNotFit, or KeyError
    if the profile lacks a part.
    """
    profile, shape = profile or find_profile(cell.profile), find_shape(cell.model)
    if cell.system == RECORDED:
        target = replay.Target(shape, cell.context, cell.batch, cell.alpha)
        return replay.replay(run, profile, target, most=2)
    case = Scenario(profile, shape, cell.context, cell.batch, cell.alpha, cell.host)
    return modelled.timeline(case, cell.system)


def evaluate(cell: Cell, profile: Profile | None = None, run: Timeline | None = None) -> dict:
    """One row: the cell, the modelled milliseconds of a step, in total and by lane, and the busiest lane."""
    row = asdict(cell) | {"ms": math.nan, "tokens/s": math.nan, "drive GB": math.nan, "bound": "", "note": ""}
    try:
        line = timeline(cell, profile, run)
    except (DoesNotFit, KeyError) as error:
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
    """A row for each cell, in order, computed in `jobs` processes (-1: one per core).

    `done(count)` is called as rows arrive. UsageError for cells that replay a run if none is given.
    """
    if not jobs:
        raise UsageError("no sweep with 0 jobs: choose 1 or more, or -1 for one per core")
    if run is None and any(cell.system == RECORDED for cell in wanted):
        raise UsageError("no recorded run to replay: name its trace with --run")
    profiles, rows = {name: find_profile(name) for name in {cell.profile for cell in wanted}}, []
    pool = joblib.Parallel(n_jobs=jobs, return_as="generator")
    for row in pool(joblib.delayed(evaluate)(cell, profiles[cell.profile], run) for cell in wanted):
        rows.append(row)
        done(len(rows))
    return pd.DataFrame(rows)


def load_run(path: Path) -> Timeline:
    """A trace of `hillinfer run --trace`. UsageError for another file."""
    try:
        timeline = Timeline.load(path)
        recording.read_summary(timeline)
        recording.decode_steps(timeline)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}; record a run with: hillinfer run ... --trace {path}") from None
    return timeline
