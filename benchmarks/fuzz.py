"""Fuzz every parser: python -m benchmarks.fuzz --cases 1000000

Cases are mutated valid examples: bytes flipped, cut, repeated or spliced; numbers and words replaced by awkward ones. A
parser may accept a case or reject it with its documented error. Any other exception, or more than a second, is a
failure. Seeded, so the cases are the same in every run.
"""

import argparse
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hillinfer import gguf_file
from hillinfer.errors import UsageError
from hillinfer.longbench import results, sources
from hillinfer.longbench.tasks import find_task
from hillinfer.session_file import Saved, save
from hillinfer.systems.hillinfer.profile import Cost, Profile
from hillinfer.systems.shapes import find_shape
from hillinfer.timeline import Timeline
from hillinfer.whatif.devices import find_profile
from hillinfer.whatif.sweep import load_run

AWKWARD = [b"", b"null", b"-1", b"0", b"1e999", b"NaN", b"9" * 23, b"[]", b"{}", b'"x"', b"true", b"[[", b"{", b"\xff"]
AWKWARD += [b"\x00", b"\\ud800", b"[" * 3000, b"1" * 5000, b"\n", b'"', b"1e400", b"-0.0"]
LIMIT = 1.0  # seconds for one case; all cases are small


@dataclass
class Parser:
    """`parse` may return, or raise one of `errors`."""

    name: str
    seeds: list[bytes]
    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    share: float  # of all cases
    taken: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


class Hang(BaseException):
    """A case took too long."""


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            other = rng.choice(seeds)
            data[at : at + rng.randrange(40)] = other[at : at + rng.randrange(40)]
        elif kind == 5:
            data[at : at + rng.choice((0, 1, 4, 8))] = rng.choice(AWKWARD)
        else:  # replace the text between two delimiters
            ends = [i for i in range(at, min(len(data), at + 80)) if data[i] in b',:[]{}=\n"']
            if len(ends) > 1:
                data[ends[0] + 1 : ends[1]] = rng.choice(AWKWARD)
    return bytes(data)


def parsers(folder: Path) -> list[Parser]:
    def on_file(name: str, parse: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = folder / name

        def run(data: bytes):
            path.write_bytes(data)
            return parse(path)

        return run

    def profile(path: Path) -> None:
        Profile.load(path).speeds(4096)

    def session(path: Path) -> None:
        file = Saved(path)
        try:
            for layer in range(file.layers):
                file.read(layer, 0, file.n)
        finally:
            file.close()

    def rows(name: str) -> Callable[[bytes], object]:
        path = folder / sources._files(find_task(name))[0]

        def run(data: bytes):
            path.write_bytes(data)
            task = find_task(name)
            for record in sources.load(task, [folder])[0]:
                task.parts(record)
                task.buckets(record)

        return run

    return [
        Parser("session", _sessions(folder), on_file("doc.kv", session), (UsageError,), 0.2),
        Parser("GGUF header", _headers(), on_file("m.gguf", gguf_file.read), (UsageError,), 0.1),
        Parser("device profile", _profiles(folder), on_file("p.toml", profile), (UsageError,), 0.2),
        Parser("trace", _traces(folder), on_file("t.json", load_run), (UsageError,), 0.15),
        Parser("task rows, LongBench v2", _rows("v2"), rows("longbench-v2"), (UsageError,), 0.07),
        Parser("task rows, LongEval", _rows("longeval"), rows("longeval_200"), (UsageError,), 0.07),
        Parser("task rows, RULER", _rows("ruler"), rows("ruler_niah_single_1"), (UsageError,), 0.07),
        Parser("results", _results(), lambda data: results.parse(data, folder), (UsageError,), 0.14),
    ]


def _sessions(folder: Path) -> list[bytes]:
    out = []
    for shape, dtype in (((2, 1, 40, 2, 1, 4), torch.float32), ((1, 2, 9, 2, 2, 2), torch.bfloat16)):
        records, path = torch.randn(shape).to(dtype), folder / "seed.kv"
        facts = {"model": "0" * 64, "ids": list(range(shape[2])), "pieces": [shape[2]]}
        save(path, [[layer] for layer in records], shape, dtype, facts)
        out.append(path.read_bytes())
        path.unlink()
    return out


def _headers() -> list[bytes]:
    def text(word: bytes) -> bytes:
        return struct.pack("<Q", len(word)) + word

    keys = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    keys += text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text(b"the") * 3
    keys += text(b"tokenizer.ggml.scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)
    tensor = text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 3, 0, 0)
    return [b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + keys + tensor]


def _profiles(folder: Path) -> list[bytes]:
    measured = find_profile("h200").with_numbers("this-machine", emulated_score=1e9, emulated_fetch=2e9)
    measured = replace(measured, kinds={"topk.score": Cost((1.0, 2.0), (0.1, 0.2), "measured: here")})
    seeds = [find_profile("h200"), find_profile("rtx4090-smartssd"), measured]
    return [seed.save(folder / "seed.toml").read_bytes() for seed in seeds]


def _traces(folder: Path) -> list[bytes]:
    from dataclasses import asdict

    timeline = Timeline()
    for step in range(2):
        for layer in range(2):
            at = 1000 * (2 * step + layer)
            timeline.add("cpu", "dense", layer, step, at, at + 100)
            timeline.add("drive", "read", layer, step, at + 100, at + 300, 4096)
            timeline.add("cpu", "attend", layer, step, at + 300, at + 900, 64)
    shape = asdict(find_shape("llama-3.1-8b"))
    timeline.about = dict(system="hillinfer", shape=shape, batch=1, cached=10.0, attended=5.0, pool=0.5, drive=0.1)
    return [timeline.save(folder / "seed.json").read_bytes()]


def _rows(kind: str) -> list[bytes]:
    v2 = dict(_id="a", question="q", context="c", answer="A", difficulty="easy", length="short")
    rows = {
        "v2": v2 | {f"choice_{letter}": "x" for letter in "ABCD"},
        "longeval": dict(prompt="line 1. Now the record is over. Tell", expected_number=7, random_idx=["a", 1]),
        "ruler": dict(index=1, input="text\nask?", outputs=["7"], length=9, answer_prefix=" It is"),
    }
    one = json.dumps(rows[kind])
    return [f"{one}\n{one}\n".encode(), f"[{one},{one}]".encode()]


def _results() -> list[bytes]:
    row = dict(model="m", task="t", id="1", system="full", alpha=0.2, score=1.0, answer="x")
    return [(json.dumps(row) + "\n").encode() * 2]


def fuzz(parser: Parser, cases: int, seed: int) -> Iterator[int]:
    rng = random.Random(f"{parser.name} {seed}")

    def stop(*_):
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    for number in range(cases):
        data = mutated(rng, parser.seeds)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            parser.parse(data)
            parser.taken += 1
        except parser.errors:
            parser.refused += 1
        except (Exception, Hang) as error:
            parser.failures.append(f"case {number}: {error!r} of {data[:300]!r}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if len(parser.failures) >= 20:
            return
        yield number


def run(cases: int, seed: int = 0, report: Callable[[str], None] = print) -> list[Parser]:
    """Fuzz all parsers, each with its share of the cases; `report` receives the results as text."""
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=home) as name:
        found = parsers(Path(name))
        for parser in found:
            start = time.perf_counter()
            for _ in fuzz(parser, int(cases * parser.share), seed):
                pass
            took, count = time.perf_counter() - start, parser.taken + parser.refused
            report(
                f"{parser.name}: {count:,} cases, {parser.taken:,} taken, {parser.refused:,} refused, "
                f"{len(parser.failures)} failures, {took:.0f} s"
            )
            for failure in parser.failures[:5]:
                report(f"  {failure}")
    return found


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--cases", type=int, default=1_000_000)
    words.add_argument("--seed", type=int, default=0)
    args = words.parse_args()
    return int(any(parser.failures for parser in run(args.cases, args.seed)))


if __name__ == "__main__":
    sys.exit(main())
