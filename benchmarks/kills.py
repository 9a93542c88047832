"""SIGKILL at random moments of a save and of a generation: python -m benchmarks.kills --kills 200

Two documents alternate in one session file. Children are forked from a single-threaded process with the model: one
saves or generates until it is killed, the next opens the session and answers. For half of the children, O_TMPFILE is
emulated as missing, so a drive file briefly has a name.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from hillinfer.assets import load_embedded
from hillinfer.errors import UsageError
from hillinfer.longbench.runner import feed, synthetic_prompt
from hillinfer.longbench.synthetic import make_records
from hillinfer.session import open_session, save_session
from hillinfer.systems.registry import make_cache

TOKENS, NEW = 700, 6


class Bench:
    """The model, two documents, and the answer to each after a fresh prefill."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)  # fork needs a single-threaded process
        self.model, tokenizer = load_embedded()
        self.folder, self.target, self.drive = folder, folder / "doc.kv", folder / "drive"
        self.drive.mkdir()
        self.ids, self.question, self.want = {}, [5, 6, 7], {}
        for name, seed in (("a", 1), ("b", 2)):
            self.ids[name] = synthetic_prompt(tokenizer, make_records("lines", 1024, 1, seed)[0])[1].ids[:TOKENS]
            with torch.no_grad(), make_cache(self.model, "hillinfer", **self.options) as cache:
                feed(self.model, cache, self.ids[name])
                save_session(cache, folder / f"{name}.kv", self.model, self.ids[name])
                self.want[name] = self.answer(cache, self.ids[name])

    @property
    def options(self) -> dict:
        return dict(alpha=0.2, drive=self.drive)

    def answer(self, cache, ids: list[int], new: int = NEW) -> list[int]:
        whole = torch.tensor([[*ids, *self.question]])
        mask = torch.ones_like(whole)
        out = self.model.generate(
            whole, attention_mask=mask, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return out[0, whole.shape[1] :].tolist()

    def save(self, name: str, ready: Callable[[], None]) -> None:
        cache, ids = open_session(self.folder / f"{name}.kv", self.model, "full")
        ready()
        save_session(cache, self.target, self.model, ids)

    def generate(self, ready: Callable[[], None]) -> None:
        ready()
        cache, ids = open_session(self.target, self.model, "hillinfer", **self.options)
        with cache:
            self.answer(cache, ids, 200)

    def look(self) -> str:
        """Open the session: `a` or `b` if the tokens are right, `wrong`, or `refused` with the error."""
        try:
            cache, ids = open_session(self.target, self.model, "hillinfer", **self.options)
        except UsageError as error:
            return f"refused: {error}"
        with cache:
            name = next((name for name, tokens in self.ids.items() if tokens == ids), None)
            return name if name and self.answer(cache, ids) == self.want[name] else "wrong"


def forked(job: Callable[[Callable[[str], None]], None], named: bool = False) -> tuple[int, int]:
    """Fork a child that runs `job(say)`. Returns its pid and the pipe that receives its messages."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        if named:
            del os.O_TMPFILE
        job(lambda text: os.write(write, text.encode()))
        os._exit(0)
    except BaseException as error:
        os.write(write, repr(error).encode())
        os._exit(1)


def told(pid: int, pipe: int) -> str:
    """All messages of a child, up to its exit."""
    with os.fdopen(pipe, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text


def took(job: Callable) -> float:
    """Seconds from a child's first message to its exit: the minimum of three, since the first run warms up the disk."""
    seconds = []
    for _ in range(3):
        pid, pipe = forked(job)
        os.read(pipe, 2)
        start = time.perf_counter()
        told(pid, pipe)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run(kills: int, seed: int = 0) -> Counter:
    """Counts of the states found after kills: old, new, refused, wrong; in time; orphans found and remaining."""
    rng, found = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        saving = took(lambda say: bench.save("a", lambda: say("go")))
        generating = min(3.0, took(lambda say: bench.generate(lambda: say("go"))))
        for number in range(kills):
            save, named = number % 2 == 0, number % 4 > 1
            old = rng.choice(["a", "b", None] if save else ["a", "b"])
            bench.target.unlink(missing_ok=True)
            if old is not None:
                shutil.copy(bench.folder / f"{old}.kv", bench.target)
            new = "b" if old == "a" else "a"
            work = (lambda say, new=new: bench.save(new, lambda: say("go"))) if save else (
                lambda say: bench.generate(lambda: say("go"))
            )  # fmt: skip
            pid, pipe = forked(work, named)
            os.read(pipe, 2)
            time.sleep(rng.uniform(0, saving if save else generating))
            os.kill(pid, signal.SIGKILL)
            killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
            os.close(pipe)
            found["killed while saving" if save else "killed while generating"] += killed
            found["ended before the kill"] += not killed
            found["orphans"] += len(orphans(bench))
            seen = told(*forked(lambda say: say(bench.look()), named=True))
            if seen.startswith("refused"):
                found["refused"] += 1
                found["refused though one was there"] += old is not None
            else:
                found["old" if seen == old else "new" if seen == new and save else "wrong"] += 1
            found["orphans left"] += len(orphans(bench))
    return found


def orphans(bench: Bench) -> list[Path]:
    return [*bench.drive.iterdir(), *bench.folder.glob(".*.part")]


def readers(count: int = 8) -> tuple[int, int]:
    """Open one session in several processes at once: number of correct answers, and of processes."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        shutil.copy(bench.folder / "a.kv", bench.target)
        before = bench.target.read_bytes()
        children = [forked(lambda say: say(bench.look())) for _ in range(count)]
        agreed = sum(told(*child) == "a" for child in children)
        return agreed if bench.target.read_bytes() == before else 0, count


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--kills", type=int, default=200)
    found = run(words.parse_args().kills)
    print(json.dumps(found, indent=1))
    return int(found["wrong"] > 0 or found["orphans left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
