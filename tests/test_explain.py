"""`explain` names the cause of a slow step: three that are injected into a real run, and others by hand."""

import time

import numpy as np
import pytest

from hillinfer import UsageError
from hillinfer.assets import load_embedded
from hillinfer.layer import Layer
from hillinfer.longbench.runner import feed
from hillinfer.systems.registry import make_cache
from hillinfer.timeline import Counters, Hits, Timeline
from hillinfer.workbench.cases import Case
from hillinfer.workbench.explain import WORK, costs, explain

PREFILL, STEPS, SLOW = 1200, 16, 10  # tokens; decode steps; the one that is disturbed


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


class SteadyDrive:
    """An I/O engine of a drive that reads `rate` bytes/s in each thread: the machine's own is too fast to tell."""

    rate = 12e6

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def transfer(self, write, fd, offsets, addresses, lengths, *rest, **options):
        time.sleep(0 if write else float(np.sum(lengths)) / self.rate)
        return self.engine.transfer(write, fd, offsets, addresses, lengths, *rest, **options)


def disturbed(embedded, folder, disturb, undo=lambda cache: None, **options):
    """A cache after STEPS decode steps, and the one that was disturbed, between `disturb` and `undo`."""
    model, tokenizer = embedded
    ids = Case.task(tokenizer, "chain", 1400, 2).context
    with make_cache(model, "hillinfer", **(dict(alpha=0.2, drive=folder, lookahead=False) | options)) as cache:
        feed(model, cache, ids[:PREFILL])
        cache.run.drive.engine = SteadyDrive(cache.run.drive.engine)
        cache.timeline.clear()
        cache.counters.clear()
        for number in range(STEPS):
            if number == SLOW:
                disturb(cache)
            feed(model, cache, [ids[PREFILL + number]])
            if number == SLOW:
                undo(cache)
    return cache, cache.counters.rows[0].step + SLOW


def explained(cause: str, *args, **options):
    """The disturbed cache, its step and why; again, at most twice, where another process took the step's time."""
    for _ in range(3):
        cache, step = disturbed(*args, **options)
        found = cache.explain(step)
        if found.cause == cause:
            break
    assert found.cause == cause, str(found)
    return cache, step, found


def test_a_slow_drive_is_named(embedded, tmp_path):
    def slow(cache):
        cache.run.drive.engine.rate = 2e6

    def well(cache):
        cache.run.drive.engine.rate = SteadyDrive.rate

    *_, found = explained("slow drive", embedded, tmp_path, slow, well)
    assert "the drive lane" in found.sentence and "MiB/s instead of" in found.sentence


def test_a_cold_pool_is_named(embedded, tmp_path):
    def empty(cache):
        for layer in cache.tiered:
            for pool in layer.store.pools:
                pool.slot_of[:], pool.token_of[:] = -1, -1  # as if nothing had ever been in it

    cache, step, found = explained("cold pool", embedded, tmp_path, empty, host_budget="8MiB")
    assert "never in it" in found.sentence
    rows = {name: (one, usual) for name, _, one, usual in found.rows}
    hits = [row for row in cache.counters.rows if row.step == step]
    assert rows["missed, never in the pool"][0] == sum(row.drive - row.demoted for row in hits)
    assert str(found).startswith(found.sentence) and "median step" in str(found)


def test_wrong_guesses_are_named(embedded, tmp_path, monkeypatch):
    wrong, select = [False], Layer.select

    def astray(self, query, valid, scaling, kind="select", share=1.0):
        picks = select(self, query, valid, scaling, kind, share)
        if kind == "guess" and wrong[0]:  # as many tokens as the guess has, and none of them
            return [np.setdiff1d(np.arange(self.n), picks[0])[: len(picks[0])]]
        return picks

    def turn(cache):
        wrong[0] = not wrong[0]

    monkeypatch.setattr(Layer, "select", astray)
    *_, found = explained("wrong guesses", embedded, tmp_path, turn, turn, lookahead=True)
    assert "prefetched tokens not selected" in found.sentence


def hand_made(stretch=None) -> tuple[Timeline, Counters]:
    """Ten steps of 6 ms dense, 1 ms select, 2 ms read and 1 ms outside. `stretch`: ms more of a kind in step 5."""
    timeline, counters, now = Timeline(), Counters(), 0
    for step in range(10):
        for kind, lane, ms in (("append", "cpu", 0), ("dense", "cpu", 6), ("select", "cpu", 1), ("read", "drive", 2)):
            ms += (stretch or {}).get(kind, 0) if step == 5 else 0
            timeline.add(lane, kind, 0, step, now, now + round(ms * 1e6), 2**20 if kind == "read" else 0)
            now += round(ms * 1e6)
        now += 10**6
        counters.rows.append(Hits(step, 0, 100, 20, 20, 5, 10, 5, 2, 4, 3, 0))
    return timeline, counters


class Record:
    def __init__(self, timeline, counters):
        self.timeline, self.counters = timeline, counters


def test_times_add_up_and_the_model_is_named_where_it_was_the_model():
    found = costs(*hand_made())
    assert all(cost["time"] == pytest.approx(sum(cost[work] for work in WORK)) for cost in found.values())
    assert found[3]["the model's own work"] == pytest.approx(6) and found[3]["outside all spans"] == pytest.approx(1)
    assert found[3]["missed, never in the pool"] == 3 and found[3]["prefetched, not selected"] == 1
    assert found[3]["the drive's reads"] == pytest.approx(500)
    slow = explain(Record(*hand_made({"dense": 20})), 5)
    assert slow.cause == "the model's own work" and "3.0 times the median" in slow.sentence
    assert explain(Record(*hand_made({"dense": 20})), 4).cause == ""
    assert explain(Record(*hand_made({"read": 20})), 5).cause == "slow drive"


def test_a_run_is_summed_up():
    found = explain(Record(*hand_made({"read": 10})))
    assert found.cause == "the model's own work" and found.columns == ("mean step", "step 5, the slowest")
    assert "10 steps took" in found.sentence and "25% of the selected tokens came from the drive" in found.sentence
    assert "25% of the prefetched ones were not selected" in found.sentence
    for step in (None, 3):
        with pytest.raises(UsageError, match="was recorded"):
            explain(Record(Timeline(), Counters()), step)
