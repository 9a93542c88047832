"""Hardware profiles: what the parts of a machine hold and do in a second, every number with its source.

A profile is a TOML file. A number is `{ value = 1e9, source = "..." }`; a rate that depends on the size of one piece is
`{ block = [4096, ...], rate = [...], source = "..." }`, in bytes and bytes/s. A source says how the number is known:
"measured: ...", "published: ..." or "assumed: ...".
"""

import json
import math
import tomllib
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np

from hillinfer import files
from hillinfer.errors import UsageError
from hillinfer.systems.hillinfer.balance import Speeds

KNOWN = ("measured", "published", "assumed")
THIS = "this-machine"
# part -> what it must have, what it may have. Sizes in bytes, rates in bytes/s, calls in seconds, flops in 1/s.
PARTS = {
    "gpu": ({"memory", "bandwidth", "flops"}, {"call"}),  # call: what a kernel takes at least
    "cpu": ({"memory", "bandwidth", "flops"}, {"call", "score", "gather", "lanes"}),  # lanes: tasks at once
    "link": ({"to_gpu", "from_gpu"}, {"call"}),  # host memory to GPU memory and back
    # read: many reads in flight; read_one: one at a time; mapped: through a page cache that must evict
    "drive": ({"read", "write"}, {"read_one", "mapped", "call"}),
    "scorer": ({"memory", "dram_read", "nand_read", "link"}, set()),  # in the drive, with DRAM of its own
}
NEEDED = ("cpu", "drive")


@dataclass(frozen=True)
class Rate:
    """A number, or a curve over the size of one piece: straight between its points in logarithms, flat beyond them."""

    values: tuple[float, ...]
    source: str
    blocks: tuple[float, ...] = ()

    def at(self, block: float = math.inf) -> float:
        if not self.blocks or block >= self.blocks[-1]:
            return self.values[-1]
        return math.exp(np.interp(math.log(max(block, 1)), self._logs[0], self._logs[1]))

    @cached_property
    def _logs(self) -> tuple[np.ndarray, np.ndarray]:
        return np.log(self.blocks), np.log(self.values)


@dataclass(frozen=True)
class Cost:
    """What one call of a kind of work took on the machine itself: `seconds` at each of `sizes`, both ascending.

    A size is in bytes (`recording.size_of`). Between points a straight line, as a call has a part that is always the
    same and one that grows; below the first as long as that; beyond the last as fast for each byte as there. One line
    for all would not do: what fits a processor's cache takes half the time for each byte.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str = ""

    def at(self, size: float, calls: int = 1) -> float:
        """Seconds of `calls` calls, `size` in all."""
        each = size / calls
        if each >= self.sizes[-1]:
            return calls * self.seconds[-1] * each / self.sizes[-1]
        if each <= self.sizes[0]:
            return calls * self.seconds[0]
        return calls * float(np.interp(each, self.sizes, self.seconds))


@dataclass(frozen=True)
class Profile:
    """`parts` by name and number; `kinds` are the measured costs of this project's own code, of this machine only."""

    name: str
    about: str
    parts: dict[str, dict[str, Rate]]
    kinds: dict[str, Cost] = field(default_factory=dict)

    def has(self, part: str, number: str | None = None) -> bool:
        return part in self.parts and (number is None or number in self.parts[part])

    def get(self, path: str, block: float = math.inf, default: float | None = None) -> float:
        """The number at `part.number`, at this size of a piece. KeyError where it is unknown and has no default."""
        part, number = path.split(".")
        rate = self.parts.get(part, {}).get(number)
        if rate is None:
            if default is None:
                raise KeyError(f"profile {self.name} has no {path}")
            return default
        return rate.at(block)

    def speeds(self, code_bytes: int, record_bytes: int) -> Speeds:
        """What the balance of host and drive needs (`systems.hillinfer.balance`): codes in the drive's DRAM; records
        gathered in the host and sent in one piece, or read one by one and sent.
        """
        link = 1 / self.get("link.to_gpu", default=math.inf)
        drive = self.get("drive.read", record_bytes)
        fs = self.get("scorer.dram_read", default=drive * code_bytes / record_bytes)
        return Speeds(self.score_rate, fs, 1 / (1 / self.gather_rate + link), 1 / (1 / drive + link))

    @property
    def capacity(self) -> dict[str, int]:
        """Tasks that a lane does at once."""
        return {"cpu": round(self.get("cpu.lanes", default=1))}

    @property
    def score_rate(self) -> float:
        """Key codes that the host scores, bytes/s; by default as fast as it reads memory."""
        return self.get("cpu.score", default=self.get("cpu.bandwidth"))

    @property
    def gather_rate(self) -> float:
        """Records that the host gathers, bytes/s; by default half its bandwidth, as each is read and written."""
        return self.get("cpu.gather", default=self.get("cpu.bandwidth") / 2)

    def with_numbers(self, name: str, **numbers: float | Rate) -> "Profile":
        """The same with other numbers, `part_number=value`, under another name: for what-ifs and sensitivity."""
        parts = {part: dict(own) for part, own in self.parts.items()}
        for path, value in numbers.items():
            part, number = path.split("_", 1)
            own = value if isinstance(value, Rate) else Rate((float(value),), f"assumed: {name}")
            parts.setdefault(part, {})[number] = own
        return replace(self, name=name, parts=parts)

    def sources(self) -> dict[str, int]:
        """How many numbers are measured, published, assumed."""
        all_ = [rate.source for part in self.parts.values() for rate in part.values()]
        all_ += [cost.source for cost in self.kinds.values()]
        return {known: sum(source.startswith(known) for source in all_) for known in KNOWN}

    def save(self, path: Path) -> Path:
        lines = [f"name = {json.dumps(self.name)}", f"about = {json.dumps(self.about)}"]
        for part, numbers in self.parts.items():
            lines += ["", f"[{part}]"]
            for number, rate in numbers.items():
                values = ", ".join(f"{value:.6g}" for value in rate.values)
                blocks = ", ".join(f"{block:.0f}" for block in rate.blocks)
                own = f"block = [{blocks}], rate = [{values}]" if rate.blocks else f"value = {values}"
                lines.append(f"{number} = {{ {own}, source = {json.dumps(rate.source)} }}")
        if self.kinds:
            lines += ["", "[kinds]"]
        for kind, cost in self.kinds.items():
            sizes, took = (", ".join(f"{value:.6g}" for value in own) for own in (cost.sizes, cost.seconds))
            source = json.dumps(cost.source)
            lines.append(f'"{kind}" = {{ size = [{sizes}], seconds = [{took}], source = {source} }}')
        return files.write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """UsageError, which names the place and the fix, for a file that is no profile."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is no profile ({error}); name one of {', '.join(list_profiles())}") from None

        def refuse(what: str):
            raise UsageError(f"{path}: {what}")

        for name in ("name", "about"):
            if not isinstance(data.get(name), str):
                refuse(f'add {name} = "..." at the top')
        if unknown := set(data) - {"name", "about", "kinds", *PARTS}:
            refuse(f"no part '{min(unknown)}'; the parts are {', '.join(PARTS)}")
        parts = {part: data[part] for part in (*PARTS, "kinds") if part in data}
        for part, numbers in parts.items():
            if not isinstance(numbers, dict):
                refuse(f"{part} is no table: write [{part}]")
        costs = parts.pop("kinds", {})
        for part in (*NEEDED, *(["link"] if "gpu" in parts else [])):
            if part not in parts:
                refuse(f"add a part [{part}]")
        for part, numbers in parts.items():
            must, may = PARTS[part]
            if missing := must - set(numbers):
                refuse(f"[{part}] lacks {', '.join(sorted(missing))}")
            if unknown := set(numbers) - must - may:
                refuse(f"[{part}] has no '{min(unknown)}'; it may have {', '.join(sorted(must | may))}")
            parts[part] = {number: _rate(value, f"{part}.{number}", refuse) for number, value in numbers.items()}
        kinds = {kind: _cost(value, f"kinds.{kind}", refuse) for kind, value in costs.items()}
        return cls(data["name"], data["about"], parts, kinds)


def _rate(value, where: str, refuse) -> Rate:
    source = _source(value, where, refuse)
    if set(value) == {"value", "source"}:
        values, blocks = [value["value"]], []
    elif set(value) == {"block", "rate", "source"}:
        values, blocks = value["rate"], value["block"]
        if not (isinstance(values, list) and isinstance(blocks, list) and len(values) == len(blocks) > 1):
            refuse(f"{where} needs as many rates as blocks, two or more")
        if not all(map(_is_number, blocks)) or any(b <= a for a, b in pairwise(blocks)):
            refuse(f"{where} needs its blocks in ascending order")
    else:
        refuse(f"{where} must be {{ value, source }} or {{ block, rate, source }}")
    if not all(_is_number(v) and v > 0 for v in values):
        refuse(f"{where} must be a number above zero")
    return Rate(tuple(map(float, values)), source, tuple(map(float, blocks)))


def _cost(value, where: str, refuse) -> Cost:
    source = _source(value, where, refuse)
    if set(value) != {"size", "seconds", "source"}:
        refuse(f"{where} must be {{ size, seconds, source }}")
    sizes, took = value["size"], value["seconds"]
    if not (isinstance(sizes, list) and isinstance(took, list) and len(sizes) == len(took) > 0):
        refuse(f"{where} needs as many seconds as sizes")
    if not all(_is_number(v) and v > 0 for v in sizes + took) or any(b <= a for a, b in pairwise(sizes)):
        refuse(f"{where} must have numbers above zero, its sizes in ascending order")
    return Cost(tuple(map(float, sizes)), tuple(map(float, took)), source)


def _source(value, where: str, refuse) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("source"), str):
        refuse(f'{where} has no source: write {{ value = ..., source = "measured: ..." }}')
    if not value["source"].startswith(tuple(f"{known}: " for known in KNOWN)):
        refuse(f"the source of {where} must begin with one of {', '.join(f'{known}:' for known in KNOWN)}")
    return value["source"]


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # neither nan nor infinite, and an integer fits a float


def list_profiles() -> list[str]:
    """Names of the profiles that ship, and `this-machine`, which `hillinfer profile` writes."""
    folder = resources.files("hillinfer.whatif") / "profiles"
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml")) + [THIS]


def find_profile(name: str | Path, own: Path = Path("out/this-machine.toml")) -> Profile:
    """A profile that ships, a TOML file, or `this-machine` from where `hillinfer profile` puts it."""
    if str(name).endswith(".toml"):
        return Profile.load(Path(name))
    if name == THIS:
        if not own.exists():
            raise UsageError(f"{own} is not there yet; measure this machine with: hillinfer profile --drive FOLDER")
        return Profile.load(own)
    if name not in list_profiles():
        raise UsageError(f"no profile '{name}'; choose {', '.join(list_profiles())}, or name a .toml file")
    with resources.as_file(resources.files("hillinfer.whatif") / "profiles" / f"{name}.toml") as path:
        return Profile.load(path)
