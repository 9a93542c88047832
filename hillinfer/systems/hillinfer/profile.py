"""Device profiles: capacity and throughput of a machine's parts, with the source of every number.

A profile is a TOML file with a table for each part. A number is `{ value = 1e9, source = "..." }`; a rate that depends
on the size of a transfer is `{ block = [4096, ...], rate = [...], source = "..." }`, in bytes and bytes/s. A source
begins with `measured:`, `published:` or `assumed:`. `[kinds]` holds measured costs of this project's own code,
`{ size = [...], seconds = [...], source = "..." }`. `hillinfer profile` writes the profile of this machine.
"""

import json
import math
import tomllib
from dataclasses import dataclass, field, replace
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
    # lanes: concurrent tasks; start: of a native call's threads; python: of a layer's step, around its kernels
    "cpu": ({"memory", "bandwidth", "flops"}, {"call", "score", "gather", "lanes", "start", "python"}),
    # between host and GPU memory, pinned; wait: seconds from the end of the GPU's work until the host goes on
    "link": ({"to_gpu", "from_gpu"}, {"call", "wait"}),
    # read: at high queue depth; read_one: at queue depth 1; mapped: through a page cache that must evict
    "drive": ({"read", "write"}, {"read_one", "mapped", "call"}),
    "scorer": ({"memory", "dram_read", "nand_read", "link"}, set()),  # a computational drive, with its own DRAM
    "emulated": ({"score", "fetch"}, set()),  # the drive of `--drive-kind emulated`: key codes, records
}


@dataclass(frozen=True)
class Rate:
    """A rate in bytes/s over the transfer size: log-log interpolation between its points, flat beyond them.

    One point is a constant.
    """

    values: tuple[float, ...]
    source: str
    blocks: tuple[float, ...] = (1.0,)

    def at(self, block: float = math.inf) -> float:
        if block >= self.blocks[-1]:
            return self.values[-1]
        return math.exp(np.interp(math.log(max(block, 1)), np.log(self.blocks), np.log(self.values)))

    def columns(self) -> dict:
        """Its entry in a file."""
        points = {"value": self.values[0]} if len(self.blocks) == 1 else {"block": self.blocks, "rate": self.values}
        return points | {"source": self.source}


@dataclass(frozen=True)
class Cost:
    """Measured `seconds` of one call by size in bytes (`recording.size_of`), both ascending.

    Linear between points, since a call has a fixed and a growing part; constant below the first; proportional to the
    size beyond the last. A single line does not fit: data in the processor's cache takes half the time per byte.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str = ""

    def at(self, size: float, calls: int = 1) -> float:
        """Seconds of `calls` calls of `size` bytes in total."""
        each = size / calls
        return calls * float(np.interp(each, self.sizes, self.seconds)) * max(1.0, each / self.sizes[-1])

    def columns(self) -> dict:
        """Its entry in a file."""
        return {"size": self.sizes, "seconds": self.seconds, "source": self.source}


@dataclass(frozen=True)
class Profile:
    """Rates by part and number, and measured costs by kind of work, `system.kind` or `kind` (this machine only)."""

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
        """Inputs of the host/drive balance (`balance.py`) at this record size. UsageError without a drive that scores.

        The host gathers records and sends them in one piece; the drive reads them one by one and sends them.
        """
        score, fetch = "emulated.score", "emulated.fetch"
        if self.has("scorer"):
            score, fetch = "scorer.dram_read", "drive.read"
        if not self.has(score.split(".")[0]):
            raise UsageError(f"profile {self.name} has no drive that scores ([scorer] or [emulated]); {MEASURE}")
        link = 1 / self.get("link.to_gpu", default=math.inf)
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
        """Records gathered by the host, bytes/s; by default half its bandwidth: each is read and written."""
        return self.get("cpu.gather", default=self.get("cpu.bandwidth") / 2)

    def with_numbers(self, name: str, **numbers: float | Rate) -> "Profile":
        """A copy named `name` with some numbers replaced, given as `part_number=value`."""
        parts = {part: dict(rates) for part, rates in self.parts.items()}
        for path, value in numbers.items():
            part, number = path.split("_", 1)
            rate = value if isinstance(value, Rate) else Rate((float(value),), f"assumed: {name}")
            parts.setdefault(part, {})[number] = rate
        return replace(self, name=name, parts=parts)

    def sources(self) -> dict[str, int]:
        """Count of the numbers by kind of source."""
        entries = [entry for table in (*self.parts.values(), self.kinds) for entry in table.values()]
        return {known: sum(entry.source.startswith(known) for entry in entries) for known in KNOWN}

    def save(self, path: Path) -> Path:
        lines = [f"name = {_toml(self.name)}", f"about = {_toml(self.about)}"]
        for part, table in (self.parts | {"kinds": self.kinds}).items():
            lines += ["", f"[{part}]", *(f"{_toml(key)} = {_toml(entry.columns())}" for key, entry in table.items())]
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
        _require(not set(data) >= RETIRED, "it has the format of an earlier version (fc, fs, bc, bs)")
        heads = [data.pop(name, None) for name in ("name", "about")]
        _require(all(isinstance(text, str) for text in heads), 'add name = "..." and about = "..." at the top')
        unknown, missing = set(data) - {*PARTS, "kinds"}, {"cpu", "drive"} | ({"link"} if "gpu" in data else set())
        _require(not unknown, f"no part {_quoted(unknown)}; the parts are {', '.join(PARTS)}")
        _require(missing <= set(data), f"add a part [{']['.join(sorted(missing - set(data)))}]")
        for part, table in data.items():
            _require(isinstance(table, dict), f"{part} is not a table: write [{part}]")
            required, optional = PARTS.get(part, (set(), set(table)))
            known, missing = required | optional, required - set(table)
            _require(not missing, f"[{part}] lacks {', '.join(sorted(missing))}")
            unknown = _quoted(set(table) - known)
            _require(not unknown, f"[{part}] has no {unknown}; it may have {', '.join(sorted(known))}")
        parts = {part: {key: _entry(part, key, entry) for key, entry in table.items()} for part, table in data.items()}
        return cls(*heads, kinds=parts.pop("kinds", {}), parts=parts)


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


def _toml(value) -> str:
    """A value as TOML in one line, numbers to ten digits."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value) if isinstance(value, str) else f"{value:.10g}"


def _require(valid: bool, text: str) -> None:
    if not valid:
        raise ValueError(text)


def _quoted(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _entry(part: str, key: str, entry) -> Rate | Cost:
    """One validated entry. ValueError names the rule that it breaks."""
    where, source = f"{part}.{key}", entry.get("source") if isinstance(entry, dict) else None
    _require(isinstance(source, str), f'{where} has no source: write {{ value = ..., source = "measured: ..." }}')
    known = [f"{name}:" for name in KNOWN]
    _require(source.split(" ")[0] in known, f"the source of {where} must begin with one of {', '.join(known)}")
    if part != "kinds" and set(entry) == {"value", "source"}:
        entry = {"block": [1], "rate": [entry["value"]], "source": source}
    x, y, form = ("size", "seconds", "") if part == "kinds" else ("block", "rate", "{ value, source } or ")
    xs, ys = entry.get(x), entry.get(y)
    lists = isinstance(xs, list) and isinstance(ys, list) and 0 < len(xs) == len(ys) and set(entry) == {x, y, "source"}
    _require(lists, f"{where} must be {form}{{ {x}, {y}, source }}, with {x} and {y} lists of the same length")
    valid = all(type(number) in (int, float) and 0 < number < 1e300 for number in xs + ys)
    _require(valid, f"{where} must have numbers above zero")
    _require(all(a < b for a, b in pairwise(xs)), f"{where} needs its {x} in ascending order")
    xs, ys = tuple(map(float, xs)), tuple(map(float, ys))
    return Cost(xs, ys, source) if part == "kinds" else Rate(ys, source, xs)
