"""Every fault x every system with a drive: one clear error or the right tokens, and nothing left behind."""

import pytest

from benchmarks.faults import FAULTS, FINE, Bench, places
from benchmarks.faulty_drive import COUNTS
from hillinfer.native import ring

EVERY = [(place, fault) for place in places() for fault in FAULTS]
DAILY = (
    "hillinfer, ssd",
    "hillinfer, ssd, exact",
    "leoam, ssd",
    "flexgen, ssd",
    "dualblade, ssd",
)  # each way to a drive; the rest is slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


def check(bench, place: str, fault: str, engine: str, shares=(0, 0.6, 0.999)) -> None:
    seen = []
    for number, share in enumerate(shares):
        tried = bench.try_fault(place, engine, fault, share, number)
        if tried is None:
            pytest.skip(f"{place} has no such operation")
        verdict, outcome = tried
        assert verdict in FINE, (share, verdict, outcome.error)
        seen.append(verdict)
    reads = bench.want(place, engine)[1][COUNTS.index("read")]
    if fault != "slow" and (reads or fault != "stuck write"):  # what is never read is not waited for either
        assert "error" in seen, seen  # a fault that is never noticed tests nothing
    again = bench.run(place, engine)
    assert again.error is None and again.tokens == bench.want(place, engine)[0] and not again.left


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", DAILY)
def test_each_way_to_a_drive(bench, place, fault):
    check(bench, place, fault, "auto", (0, 0.6))


@pytest.mark.parametrize("fault", ["read error", "flipped bit", "stuck read", "gone at a write"])
@pytest.mark.parametrize("place", ["hillinfer, emulated", "instattention, emulated"])
def test_the_emulated_drives(bench, place, fault):
    check(bench, place, fault, "auto", (0.2, 0.5, 0.8))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["threads"] if ring.why_not() else ["io_uring", "threads"])
@pytest.mark.parametrize(("place", "fault"), EVERY)
def test_matrix(bench, place, fault, engine):
    check(bench, place, fault, engine)
