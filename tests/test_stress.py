"""Many runs with random settings, some interrupted: always correct, never stuck, nothing left behind."""

import gc
import os
import random
import threading
from pathlib import Path

import pytest
import torch

import hillinfer

RUNS = 200


class Stop(Exception):
    """Stands for the user's interrupt."""


def resources() -> tuple[int, int]:
    gc.collect()
    own = [thread for thread in threading.enumerate() if thread.name.startswith("hillinfer")]
    return len(own), len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))


@pytest.mark.slow
def test_random_runs(models, prompt, tmp_path):
    """With alpha 1 the tokens are those of the full cache; with less, those of the first run with the same alpha."""
    model, rng = models("llama"), random.Random(0)
    known: dict[tuple, torch.Tensor] = {}
    record = model.config.num_hidden_layers * 2 * 2 * 16 * 4
    before = resources()
    for run in range(RUNS):
        alpha, batch = rng.choice([0.1, 0.3, 1.0]), rng.choice([1, 2, 8])
        kind, new = rng.choice(["ssd", "ssd", "emulated"]), rng.choice([1, 12, 40])
        ids = torch.cat([prompt.roll(i, 1) for i in range(batch)])
        for row in range(1, batch):
            ids[row, : 5 * row] = 0
        tokens = prompt.shape[1] + new
        options = dict(
            alpha=alpha,
            drive=tmp_path,
            drive_kind=kind,
            paced=kind == "emulated" and rng.random() < 0.3,
            lookahead=rng.choice([True, False, "auto"]),
            placement=rng.choice(["hits", "shared-hits", "lru"]),
            pinned=rng.choice([0.0, 0.05, 0.2]),
            host_budget=rng.choice(
                [None, int(record * batch * tokens * rng.uniform(alpha + 0.01, 1.5)) + record * batch]
            ),
            recent=rng.choice([1, 8]),
        )
        with hillinfer.make_cache(model, "hillinfer", **options) as cache:
            stop_at = rng.randrange(new * 4) if rng.random() < 0.4 else None
            if stop_at is not None:
                layer, count = cache.layers[rng.randrange(3)].layer, iter(range(10**6))
                attend = layer.attend

                def broken(*args, attend=attend, count=count, stop_at=stop_at):
                    if next(count) == stop_at:
                        raise Stop
                    return attend(*args)

                layer.attend = broken
            try:
                out = model.generate(
                    ids, attention_mask=(ids != 0).long(), past_key_values=cache, max_new_tokens=new, do_sample=False
                )
            except Stop:
                continue
        want = known.setdefault((alpha, batch, new, options["recent"]), out)
        assert torch.equal(out, want), (run, options)
    del cache
    assert all(now <= then for now, then in zip(resources(), before, strict=True)) and not list(tmp_path.iterdir())
