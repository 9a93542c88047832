"""Drive faults against every system with a drive: the table of docs/faults.md, and a sweep of random faults.

python -m benchmarks.faults 10000                      # 10,000 random faults
python -m benchmarks.faults --table docs/faults.md     # every fault x every system
"""

import argparse
import contextlib
import gc
import itertools
import os
import random
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import hillinfer
from benchmarks.faulty_drive import COUNTS, FAULTS, FaultyDrive
from hillinfer.native import ring

PROMPT, NEW = 150, 5
FINE = ("error", "right", "right, unnoticed")
SURVIVED = {"slow"}  # faults that must have no effect
PLACE = re.compile(r"layer \d+, sequence \d+, position \d+")


def places() -> dict[str, dict]:
    """Settings by `system, drive kind`: all systems with a drive, on all kinds of drives that need no card."""
    found = {}
    for name in hillinfer.list_systems():
        for kind in ("ssd", "emulated"):
            options = dict(drive=tempfile.gettempdir(), drive_kind=kind)
            with contextlib.suppress(hillinfer.UsageError):
                settings = hillinfer.systems.registry.find_system(name, options)[1]
                if settings.drive_kind != kind:
                    continue
                chosen = dict(alpha=0.15, recent=4, sinks=2, drive_kind=kind)
                if settings.stream is not None:
                    chosen["host_budget"] = {"dualblade": 1_000_000}.get(name, 0)  # dualblade: two of four tensors
                if settings.compress:
                    chosen["compress"] = 0.5  # "auto" is not bit-reproducible
                found[f"{name}, {kind}"] = chosen
    return found | {"hillinfer, ssd, exact": found["hillinfer, ssd"]}


@dataclass
class Outcome:
    """Result of one run, and the resources it leaked."""

    injected: bool
    error: BaseException | None
    tokens: list[int]
    counts: np.ndarray
    left: tuple = ()

    def verdict(self, want: list[int], fault: str) -> str:
        """`error`, `right`, or the defect. Tokens before an error must also be right."""
        if self.tokens != want[: len(self.tokens)] or (self.error is None and self.tokens != want):
            return "WRONG TOKENS"
        if self.left:
            return f"LEFT BEHIND {self.left}"
        if self.error is None:
            return "right" if fault in SURVIVED or not self.injected else "right, unnoticed"
        text = str(self.error)
        named = PLACE.search(text) or fault == "full" or fault.startswith("gone")
        if not isinstance(self.error, hillinfer.DriveError) or "\n" in text or not named or fault in SURVIVED:
            return f"UNCLEAR {self.error!r}"
        return "error"


class Watch(StoppingCriteria):
    """Records each token as soon as it is generated."""

    def __init__(self):
        self.tokens: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens = input_ids[0, PROMPT:].tolist()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@dataclass
class Bench:
    """A tiny model, and the tokens of each system without faults."""

    folder: Path
    known: dict[tuple, tuple[list[int], np.ndarray]] = field(default_factory=dict)

    def __post_init__(self):
        torch.manual_seed(7)
        shape = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        rest = dict(num_key_value_heads=4, head_dim=64, max_position_embeddings=512, eos_token_id=None, pad_token_id=0)
        self.model = LlamaForCausalLM(LlamaConfig(**shape, **rest)).eval()
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        self.ids = torch.randint(2, 97, (1, PROMPT))
        self.drive = self.folder / "drive"
        self.drive.mkdir()
        self.places = places()

    def run(self, place: str, engine: str, fault: str | None = None, at: int = 0, seed: int = 0) -> Outcome:
        """One generation, with a fault at operation `at` of its kind."""
        name = place.split(", ")[0]
        before = resources()
        timeout = 0.15 if fault and fault.startswith("stuck") else 60.0
        options = self.places[place] | dict(drive=self.drive, engine=engine, timeout=timeout)
        watch, error = Watch(), None
        faulty = FaultyDrive(fault, at, seed, np.zeros(4, np.int64))
        faulty.install_everywhere()
        try:
            with hillinfer.make_cache(self.model, name, **options) as cache:
                chosen = dict(max_new_tokens=NEW, do_sample=False, stopping_criteria=StoppingCriteriaList([watch]))
                chosen |= {"custom_generate": hillinfer.exact} if place.endswith("exact") else {}
                out = self.model.generate(self.ids, past_key_values=cache, **chosen)
                watch.tokens = out[0, PROMPT:].tolist()
        except Exception as raised:
            error = raised.with_traceback(None)
            error.__cause__ = error.__context__ = None  # frames would keep buffers and threads
        finally:
            cache = None
            faulty.remove()
        return Outcome(bool(faulty.counts[3]), error, watch.tokens, faulty.counts, self.left(before))

    def want(self, place: str, engine: str) -> tuple[list[int], np.ndarray]:
        """Tokens without a fault, and the number of operations of each kind."""
        if (place, engine) not in self.known:
            first, again = self.run(place, engine), self.run(place, engine)
            if first.error or first.left or first.tokens != again.tokens:
                raise RuntimeError(f"{place} is not right even without a fault: {first.error}, {first.left}")
            self.known[place, engine] = first.tokens, first.counts
        return self.known[place, engine]

    def try_fault(self, place: str, engine: str, fault: str, share: float, seed: int) -> tuple[str, Outcome] | None:
        """Inject a fault at this share of the operations of its kind. None if the system has no such operation."""
        want, counts = self.want(place, engine)
        total = counts[COUNTS.index(FAULTS[fault])]
        if not total:
            return None
        for _ in range(5):  # timing decides which reads reach the drive
            outcome = self.run(place, engine, fault, min(int(share * total), int(total) - 1), seed)
            if outcome.injected or outcome.error or outcome.left or outcome.tokens != want:
                break
        return outcome.verdict(want, fault), outcome

    def left(self, before: tuple) -> tuple:
        """Leaked resources. Stuck requests get some time to return."""
        until = time.monotonic() + 5
        while (now := resources(self.drive)) != before and time.monotonic() < until:
            gc.collect()  # tracebacks are cycles
            time.sleep(0.01)
        return tuple(f"{a} was {b}" for a, b in zip(now, before, strict=True) if a != b)


def resources(folder: Path | None = None) -> tuple:
    ring.release_stuck()
    threads = sorted(t.name for t in threading.enumerate() if t.name.startswith("hillinfer"))
    children = ""
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            children += path.read_text(encoding="utf-8")
    files = sorted(os.listdir(folder)) if folder else []  # noqa: PTH208
    return threads, children, len(os.listdir("/proc/self/fd")), files  # noqa: PTH208


def sweep(total: int, seed: int = 0) -> int:
    """Inject `total` faults at random places, and print the outcomes by fault. Returns 1 if any was wrong."""
    rng, table, bad, after = random.Random(seed), Counter(), [], 0
    start, done = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        engines = ["threads"] if ring.why_not() else ["io_uring", "threads"]
        common = [f for f in FAULTS if not f.startswith("stuck")]
        stuck = [f for f in FAULTS if f.startswith("stuck")]
        while done < total:
            place = rng.choice(list(bench.places))
            fault = rng.choice(stuck if rng.random() < 0.03 else common)
            engine = rng.choice(engines)
            tried = bench.try_fault(place, engine, fault, rng.random(), rng.randrange(2**32))
            if tried is None or not tried[1].injected:
                continue
            verdict, outcome = tried
            done += 1
            table[fault, verdict] += 1
            if verdict not in FINE:
                bad.append(f"{place}, {engine}, {fault}: {verdict} ({outcome.error})")
                print(bad[-1], flush=True)
            if done % 1000 == 0:
                print(
                    f"{done:,} faults, {len(bad)} not as they should be, {time.monotonic() - start:.0f} s", flush=True
                )
            if done % 20 == 0:
                follow = bench.run(place, engine)
                after += 1
                if follow.error or follow.left or follow.tokens != bench.want(place, engine)[0]:
                    bad.append(f"{place}, {engine}: the run after {fault} is not right ({follow.error})")
    for (fault, verdict), count in sorted(table.items()):
        print(f"{fault:16} {verdict:18} {count:6,}")
    wrong = sum(count for (_, verdict), count in table.items() if verdict == "WRONG TOKENS")
    left = sum(count for (_, verdict), count in table.items() if verdict.startswith("LEFT"))
    errors = sum(count for (_, verdict), count in table.items() if verdict == "error")
    print(
        f"{done:,} faults injected, {errors:,} ended in one clear error, {done - errors - len(bad):,} changed nothing; "
        f"{wrong} with wrong tokens, {left} left something behind, {len(bad)} not as they should be; "
        f"{after:,} following runs compared; {time.monotonic() - start:.0f} s"
    )
    return int(bool(bad))


def row(bench: Bench, place: str) -> list[str]:
    """One system's outcome for each fault, at the first and at the last operation of its kind."""
    cells = []
    for fault in FAULTS:
        tries = [bench.try_fault(place, "auto", fault, share, 1) for share in (0, 0.999)]
        cells.append(" / ".join(sorted({verdict for verdict, _ in filter(None, tries)})) or "-")
    again = bench.run(place, "auto")
    fine = again.error is None and again.tokens == bench.want(place, "auto")[0] and not again.left
    return [place, *cells, "right" if fine else f"NOT RIGHT {again.error}"]


def table(path: Path) -> int:
    """Write docs/faults.md. Returns 1 if any outcome was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        bench, rows = Bench(Path(folder)), []
        for place in bench.places:
            rows.append(row(bench, place))
            print(" | ".join(rows[-1]), flush=True)
    write(path, rows)
    fine = {*FINE, "-", *(" / ".join(sorted(pair)) for pair in itertools.combinations(FINE, 2))}
    return int(any(cell not in fine for cells in rows for cell in cells[1:]))


def write(path: Path, rows: list[list[str]]) -> None:
    header = ["system, drive", *FAULTS, "a following run"]
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    path.write_text(PAGE.format(table="\n".join(lines)), encoding="utf-8")


PAGE = """# Faults

The behaviour of a run when its drive fails, measured by `make faults`, which writes this page: a tiny random model,
each fault at the first and at the last operation of its kind.

- `error` is one `DriveError` of one line, which names layer, sequence and position (or says that the drive is full or
  gone). All tokens before it are those of a run without faults.
- `right` is the run without a fault, to the token. `right, unnoticed` is a fault in bytes that no token depends on: a
  write behind the last step, or a speculative read.
- `-`: the system has no such operation.

After each run no file, thread, process or descriptor is left.

{table}

- **read error, write error**: EIO. **short read**: the file ends within the range that is read. **full**: no room to
  reserve; **full at a write**: ENOSPC. **flipped bit**: one random bit of the file, in the range that is read; every
  4 KiB block has a checksum in host memory.
- **slow**: a late answer. **stuck**: the kernel (io_uring) or the call (threads) never returns; the run ends after
  `timeout`. Memory that a stuck request may still write to is kept until it returns, and so is a thread that waits in
  the kernel.
- **gone**: from then on the device does not exist (ENODEV).

`python -m benchmarks.faults 10000` injects 10,000 at random places and counts the outcomes.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    return table(args.table) if args.table else sweep(args.count, args.seed)


if __name__ == "__main__":
    sys.exit(main())
