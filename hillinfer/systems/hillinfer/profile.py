"""Device profiles: capacity and throughput of a machine's parts, with the source of every number.

A profile is a TOML file with a table for each part. A number is `{ value = 1e9, source = "..." }`; a rate that depends
on the size of a transfer is `{ block = [4096, ...], rate = [...], source = "..." }`, in bytes and bytes/s. A source
begins with `measured:`, `published:` or `assumed:`. `[kinds]` holds measured costs of this project's own code,
`{ size = [...], seconds = [...], source = "..." }`. `hillinfer profile` writes one for the machine at hand.
"""

import json
import math
import tomllib
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from hillinfer import files
from hillinfer.errors import UsageError
from hillinfer.systems.hillinfer.balance import Speeds

KNOWN = ("measured", "published", "assumed")
THIS = "this-machine"
OWN = Path("out/this-machine.toml")  # the default output of `hillinfer profile`
MEASURE = f"measure this machine with: hillinfer profile --drive FOLDER, which writes {OWN}"
RETIRED = {"fc", "fs", "bc", "bs"}  # keys of the drive profiles of earlier versions
# Part -> required numbers, optional numbers. Sizes in bytes, rates in bytes/s, `call` (latency) in s, flops in 1/s.
PARTS = {
    "gpu": ({"memory", "bandwidth", "flops"}, {"call"}),
    "cpu": ({"memory", "bandwidth", "flops"}, {"call", "score", "gather", "lanes"}),  # lanes: concurrent tasks
    "link": ({"to_gpu", "from_gpu"}, {"call"}),  # between host and GPU memory
    # read: at high queue depth; read_one: at queue depth 1; mapped: through a page cache that must evict
    "drive": ({"read", "write"}, {"read_one", "mapped", "call"}),
    "scorer": ({"memory", "dram_read", "nand_read", "link"}, set()),  # a computational drive, with its own DRAM
    "emulated": ({"score", "fetch"}, set()),  # the drive of `--drive-kind emulated`: key codes, records
}


@dataclass(frozen=True)
class Rate:
    """A constant, or a curve over the transfer size: log-log interpolation between its points, flat beyond them."""

    values: tuple[float, ...]
    source: str
    blocks: tuple[float, ...] = ()

    def at(self, block: float = math.inf) -> float:
        if not self.blocks or block >= self.blocks[-1]:
            return self.values[-1]
        return math.exp(np.interp(math.log(max(block, 1)), *self._logs))

    @cached_property
    def _logs(self) -> tuple[np.ndarray, np.ndarray]:
        return np.log(self.blocks), np.log(self.values)


@dataclass(frozen=True)
class Cost:
    """Measured `seconds` of one call at each of `sizes`, both ascending; sizes in bytes (`recording.size_of`).

    Linear between points, as a call has a fixed part and one that grows; constant below the first; proportional to the
    size beyond the last. A single line would not do: data that fits the processor's cache takes half the time per byte.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str = ""

    def at(self, size: float, calls: int = 1) -> float:
        """Seconds of `calls` calls of `size` bytes in total."""
        each = size / calls
        return calls * float(np.interp(each, self.sizes, self.seconds)) * max(1.0, each / self.sizes[-1])


@dataclass(frozen=True)
class Profile:
    """`parts` by name and number; `kinds`: measured costs by kind of work, of the machine at hand only."""

    name: str
    about: str
    parts: dict[str, dict[str, Rate]]
    kinds: dict[str, Cost] = field(default_factory=dict)

    def has(self, part: str, number: str | None = None) -> bool:
        return part in self.parts and (number is None or number in self.parts[part])

    def get(self, path: str, block: float = math.inf, default: float | None = None) -> float:
        """The number `part.number` at this transfer size. KeyError if it is missing and there is no default."""
        part, number = path.split(".")
        if self.has(part, number):
            return self.parts[part][number].at(block)
        if default is None:
            raise KeyError(f"profile {self.name} has no {path}")
        return default

    def speeds(self, record_bytes: int) -> Speeds:
        """Inputs of the host/drive balance (`balance.py`) at this record size. KeyError without a drive that scores.

        Records are gathered in the host and sent in one piece, or read one by one and sent.
        """
        link = 1 / self.get("link.to_gpu", default=math.inf)
        score, fetch = "emulated.score", "emulated.fetch"
        if self.has("scorer"):
            score, fetch = "scorer.dram_read", "drive.read"
        host, drive = 1 / self.gather_rate + link, 1 / self.get(fetch, record_bytes) + link
        return Speeds(self.score_rate, self.get(score), 1 / host, 1 / drive)

    @property
    def capacity(self) -> dict[str, int]:
        """Concurrent tasks per lane."""
        return {"cpu": round(self.get("cpu.lanes", default=1))}

    @property
    def score_rate(self) -> float:
        """Key codes scored by the host, bytes/s; by default its memory bandwidth."""
        return self.get("cpu.score", default=self.get("cpu.bandwidth"))

    @property
    def gather_rate(self) -> float:
        """Records gathered by the host, bytes/s; by default half its bandwidth, as each is read and written."""
        return self.get("cpu.gather", default=self.get("cpu.bandwidth") / 2)

    def with_numbers(self, name: str, **numbers: float | Rate) -> "Profile":
        """A copy named `name` with some numbers replaced, as `part_number=value`: for what-ifs and sensitivity."""
        parts = {part: dict(rates) for part, rates in self.parts.items()}
        for path, value in numbers.items():
            part, number = path.split("_", 1)
            rate = value if isinstance(value, Rate) else Rate((float(value),), f"assumed: {name}")
            parts.setdefault(part, {})[number] = rate
        return replace(self, name=name, parts=parts)

    def sources(self) -> dict[str, int]:
        """How many numbers are measured, published, assumed."""
        entries = [entry for table in (*self.parts.values(), self.kinds) for entry in table.values()]
        return {known: sum(entry.source.startswith(known) for entry in entries) for known in KNOWN}

    def save(self, path: Path) -> Path:
        lines = [f"name = {json.dumps(self.name)}", f"about = {json.dumps(self.about)}"]
        for part, rates in self.parts.items():
            lines += ["", f"[{part}]"]
            for number, rate in rates.items():
                points = {"block": rate.blocks, "rate": rate.values} if rate.blocks else {"value": rate.values[0]}
                lines.append(f"{number} = {_inline(points, rate.source)}")
        if self.kinds:
            lines += ["", "[kinds]"]
        for kind, cost in self.kinds.items():
            lines.append(f'"{kind}" = {_inline({"size": cost.sizes, "seconds": cost.seconds}, cost.source)}')
        return files.write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """UsageError, which names the entry and the fix, for a file that is not a device profile."""
        try:
            return cls._parse(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not a device profile: {error}; correct it, or {MEASURE}") from None

    @classmethod
    def _parse(cls, data: dict) -> "Profile":
        if set(data) >= RETIRED:
            raise ValueError("it has the format of an earlier version (fc, fs, bc, bs)")
        for name in ("name", "about"):
            if not isinstance(data.get(name), str):
                raise ValueError(f'add {name} = "..." at the top')
        if unknown := set(data) - {"name", "about", "kinds", *PARTS}:
            raise ValueError(f"no part '{min(unknown)}'; the parts are {', '.join(PARTS)}")
        if missing := {"cpu", "drive", *(["link"] if "gpu" in data else [])} - set(data):
            raise ValueError(f"add a part [{min(missing)}]")
        for part in set(data) - {"name", "about"}:
            if not isinstance(data[part], dict):
                raise ValueError(f"{part} is not a table: write [{part}]")
        parts = {part: _read_part(part, data[part]) for part in PARTS if part in data}
        costs = data.get("kinds", {}).items()
        kinds = {kind: Cost(*_read_curve(entry, f"kinds.{kind}", "size", "seconds")) for kind, entry in costs}
        return cls(data["name"], data["about"], parts, kinds)


def load_speeds(path: Path, record_bytes: int) -> Speeds:
    """Speeds of the host/drive balance, from a profile file. UsageError if it has no drive that scores."""
    try:
        return Profile.load(path).speeds(record_bytes)
    except KeyError:
        raise UsageError(f"{path} has no drive that scores ([scorer] or [emulated]); {MEASURE}") from None


def check_replaceable(path: Path) -> None:
    """UsageError unless a new profile of this machine may be written here: to a new file, or over an older one."""
    if not files.plain(path).exists():
        return
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        data = {}
    if data.get("name") != THIS and not set(data) >= RETIRED:
        raise UsageError(f"{path} is not a profile of this machine; move it away, or name another file with --out")


def _inline(points: dict[str, float | tuple[float, ...]], source: str) -> str:
    """One entry as an inline table, numbers to ten digits."""

    def short(value):
        return [short(one) for one in value] if isinstance(value, tuple) else float(f"{value:.10g}")

    pairs = {key: short(value) for key, value in points.items()} | {"source": source}
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in pairs.items()) + " }"


def _read_part(part: str, table: dict) -> dict[str, Rate]:
    required, optional = PARTS[part]
    if missing := required - set(table):
        raise ValueError(f"[{part}] lacks {', '.join(sorted(missing))}")
    if unknown := set(table) - required - optional:
        raise ValueError(f"[{part}] has no '{min(unknown)}'; it may have {', '.join(sorted(required | optional))}")
    rates = {}
    for number, entry in table.items():
        if isinstance(entry, dict) and set(entry) == {"value", "source"}:
            entry = {"block": [1], "rate": [entry["value"]], "source": entry["source"]}
        blocks, values, source = _read_curve(entry, f"{part}.{number}", "block", "rate")
        rates[number] = Rate(values, source, blocks if len(blocks) > 1 else ())
    return rates


def _read_curve(entry, where: str, x: str, y: str) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """The points and the source of one entry. ValueError names the rule that it breaks."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        raise ValueError(f'{where} has no source: write {{ value = ..., source = "measured: ..." }}')
    if not entry["source"].startswith(tuple(f"{known}: " for known in KNOWN)):
        raise ValueError(f"the source of {where} must begin with one of {', '.join(f'{known}:' for known in KNOWN)}")
    xs, ys = entry.get(x), entry.get(y)
    lists = isinstance(xs, list) and isinstance(ys, list) and 0 < len(xs) == len(ys)
    if set(entry) != {x, y, "source"} or not lists:
        value = "{ value, source } or " if y == "rate" else ""
        raise ValueError(f"{where} must be {value}{{ {x}, {y}, source }}, with {x} and {y} lists of the same length")
    if not all(type(value) in (int, float) and 0 < value < 1e300 for value in xs + ys):
        raise ValueError(f"{where} must have numbers above zero")
    if any(b <= a for a, b in pairwise(xs)):
        raise ValueError(f"{where} needs its {x} in ascending order")
    return tuple(map(float, xs)), tuple(map(float, ys)), entry["source"]
