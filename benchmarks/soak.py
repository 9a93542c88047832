"""Many generations with random systems and settings: python -m benchmarks.soak --runs 1000

Tiny random models, so it takes only minutes. Some runs are interrupted, some are saved to a session and reopened. Exact
settings must generate the full cache's tokens; memory, threads and descriptors must not grow.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hillinfer.longbench.runner import feed
from hillinfer.session import open_session, save_session
from hillinfer.systems.registry import list_systems, make_cache

SHAPE = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0)
WARM = 0.2  # share of the runs after which memory counts


class Stop(Exception):
    """Simulates a user's interrupt or a drive error."""


@dataclass
class Soak:
    runs: int = 0
    stopped: int = 0
    reopened: int = 0
    compared: int = 0  # with the full cache
    wrong: list[str] = field(default_factory=list)
    rss: list[tuple[int, int]] = field(default_factory=list)  # (run, bytes)
    threads: tuple[int, int] = (0, 0)  # after the warm-up, at the end
    descriptors: tuple[int, int] = (0, 0)
    left: list[str] = field(default_factory=list)  # files

    @property
    def growth(self) -> float:
        """Relative growth of resident memory between the first and the last quarter after the warm-up."""
        values = [nbytes for run, nbytes in self.rss if run >= WARM * self.runs]
        part = max(1, len(values) // 4)
        return sum(values[-part:]) / sum(values[:part]) - 1


def models() -> list:
    torch.manual_seed(7)
    items = [LlamaForCausalLM(LlamaConfig(**SHAPE)), Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16))]
    for model in items:
        for parameter in model.eval().parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return items


def usage() -> tuple[int, int, int]:
    """Resident bytes, threads and descriptors of this process, after freed memory is returned to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGESIZE")
    items = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just exited
            items.append((task / "comm").read_text(encoding="utf-8"))
    items = [name for name in items if not name.startswith("iou-")]  # io_uring's kernel threads exit when idle
    return resident, len(items), len(list(Path("/proc/self/fd").iterdir()))


def setting(rng: random.Random, drive: str) -> tuple[str, dict, bool]:
    """A random system, its options, and whether it is exact."""
    found = list_systems()
    name = rng.choice(list(found))
    exact = rng.random() < 0.4
    options = dict(alpha=1.0 if exact else rng.choice([0.1, 0.2, 0.5]), recent=rng.choice([1, 8, 16]))
    options["lookahead"] = rng.choice([True, False, "auto"])
    options["precision"] = rng.choice(["int8", "int4", "int2"])
    if found[name].needs_drive or rng.random() < 0.5:
        options["drive"] = drive
        options["placement"] = rng.choice(["hits", "shared-hits", "lru"])
        options["engine"] = rng.choice(["auto", "threads"])
        own = found[name].settings | found[name].fixed
        scores = own.keys().isdisjoint(("drive_kind", "stream")) and found[name].policy.needs_codes
        if scores and rng.random() < 0.3:
            options |= {"drive_kind": "emulated", "precision": rng.choice(["int8", "int4"])}  # all that it scores
    if name == "leoam":
        options["compress"] = 0.0 if exact else rng.choice([0.0, 1.0, "auto"])
    return name, options, exact or found[name].policy.exact


def soak(runs: int, seed: int = 0) -> Soak:
    rng, result, known = random.Random(seed), Soak(runs), {}
    candidates = models()
    prompts = [torch.randint(2, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (60, 150, 300)]
    with tempfile.TemporaryDirectory() as folder:
        drive, path = Path(folder) / "drive", Path(folder) / "doc.kv"
        drive.mkdir()
        for run in range(runs):
            which, text = rng.randrange(len(candidates)), rng.randrange(len(prompts))
            model, ids, new = candidates[which], prompts[text], rng.choice([1, 4, 12])
            name, options, exact = setting(rng, str(drive))
            cache = make_cache(model, name, **options)
            stop_at = rng.randrange(2 * new) if rng.random() < 0.2 else None
            keep = list_systems()[name].policy.late and rng.random() < 0.2
            try:
                if keep:
                    with torch.no_grad():
                        feed(model, cache, ids[0, :-1].tolist())
                    save_session(cache, path, model, ids[0, :-1].tolist())
                    cache.close()
                    cache = open_session(path, model, name, **options)[0]
                    result.reopened += 1
                out = _generate(model, cache, ids, new, stop_at)
                if exact:
                    want = known.get((which, text, new))
                    if want is None:
                        with make_cache(model, "full") as plain:
                            want = known[which, text, new] = _generate(model, plain, ids, new, None)
                    result.compared += 1
                    if out != want:
                        result.wrong.append(f"run {run}: {name} {options}")
            except Stop:
                result.stopped += 1
            finally:
                cache.close()
            del cache
            path.unlink(missing_ok=True)
            result.left += [str(left) for left in drive.iterdir()]
            if run % max(1, runs // 100) == 0 or run == runs - 1:
                resident, threads, descriptors = usage()
                result.rss.append((run, resident))
                if run <= WARM * runs:
                    warm = threads, descriptors
        result.threads, result.descriptors = (warm[0], threads), (warm[1], descriptors)
    return result


def _generate(model, cache, ids: torch.Tensor, new: int, stop_at: int | None) -> list[int]:
    if stop_at is not None:
        layer = cache.layers[stop_at % len(cache.layers)].layer
        attend, left = layer.attend, [stop_at]

        def broken(*args):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return attend(*args)

        layer.attend = broken
    try:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new, do_sample=False
        )
    finally:
        if stop_at is not None:
            del layer.attend
    return out[0, ids.shape[1] :].tolist()


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--runs", type=int, default=1000)
    words.add_argument("--seed", type=int, default=0)
    args = words.parse_args()
    start = time.perf_counter()
    result = soak(args.runs, args.seed)
    print(
        f"{result.runs} runs in {time.perf_counter() - start:.0f} s: {result.stopped} broken off, {result.reopened} "
        f"saved and opened, {result.compared} compared with full, {len(result.wrong)} wrong, {len(result.left)} files "
        f"left; resident {result.rss[-1][1] / 2**20:.0f} MiB, {result.growth:+.2%} after the warm-up; threads "
        f"{result.threads[0]} -> {result.threads[1]}, descriptors {result.descriptors[0]} -> {result.descriptors[1]}"
    )
    for line in result.wrong[:10]:
        print(line)
    return int(bool(result.wrong or result.left))


if __name__ == "__main__":
    sys.exit(main())
