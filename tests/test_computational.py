"""The contract of a computational drive, held by the emulated one: exact scores, equal bits, nothing left behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.faulty_drive import FaultyDrive
from hillinfer import native
from hillinfer.errors import DriveError
from hillinfer.evaluator.codes import KeyCodes, head_scores_reference
from hillinfer.native import ring
from hillinfer.systems.hillinfer import worker
from hillinfer.systems.hillinfer.drive import EmulatedDrive
from hillinfer.systems.hillinfer.protocol import Emulation, Rates, Shape

ROOT = Path(__file__).parents[1]
SMALL = Shape(streams=4, batch=2, record_bytes=768, kv_heads=2, head_dim=16)
# Pages of 64 tokens, and room for the streams' growing pages and one full one: nearly all codes spill to the file.
SPILLING = Emulation(page_bytes=2048, dram_bytes=5 * 4096, timeout=20)
ROOMY = Emulation(page_bytes=2048, timeout=20)
SLOW = Rates(nand_read=1e6, nand_write=1e9, dram_read=4e4, link=1e9)  # 1,000 tokens of SMALL take 0.8 s to score


class Model:
    """One stream in plain numpy."""

    def __init__(self, shape: Shape, seed: int):
        self.shape, self.rng = shape, np.random.default_rng(seed)
        self.records = np.empty((0, shape.record_bytes), np.uint8)
        self.codes = np.empty((shape.kv_heads, 0, shape.head_dim), np.int8)
        self.hot = np.empty(0, bool)

    def tokens(self, n: int, extreme: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Random records and codes of n tokens, appended here."""
        size = self.shape.kv_heads, n, self.shape.head_dim
        codes = self.rng.choice([-127, 127], size) if extreme else self.rng.integers(-127, 128, size)
        new = self.rng.integers(0, 256, (n, self.shape.record_bytes), np.uint8), codes.astype(np.int8)
        self.records, self.codes = np.concatenate((self.records, new[0])), np.concatenate((self.codes, new[1]), 1)
        self.hot = np.append(self.hot, np.ones(n, bool))
        return new

    def query(self, group: int = 3, extreme: bool = False) -> np.ndarray:
        size = self.shape.kv_heads, group, self.shape.head_dim
        return (np.full(size, 127) if extreme else self.rng.integers(-127, 128, size)).astype(np.int8)

    def some(self) -> np.ndarray:
        return np.flatnonzero(self.rng.random(len(self.records)) < self.rng.choice([0, 0.3, 1]))

    def truncate(self, n: int) -> None:
        self.records, self.codes, self.hot = self.records[:n], self.codes[:, :n], self.hot[:n]


def check_blocks(blocks: list, model: Model, query: np.ndarray, block: int) -> None:
    """The blocks cover the cold tokens in ascending order, are full but for the last, and score them exactly."""
    cold = np.flatnonzero(~model.hot)
    assert [len(part.positions) for part in blocks] == [min(block, len(cold) - at) for at in range(0, len(cold), block)]
    for at, part in enumerate(blocks):
        wanted = cold[at * block : (at + 1) * block]
        assert part.positions.dtype == part.scores.dtype == np.int32
        np.testing.assert_array_equal(part.positions, wanted)
        np.testing.assert_array_equal(part.scores, head_scores_reference(query, model.codes[:, wanted]))


@pytest.fixture
def open_drive(tmp_path):
    """Opens drives. No thread, descriptor or file of them is left after the test."""
    before, drives = len(list(Path("/proc/self/fd").iterdir())), []

    def make(shape: Shape = SMALL, settings: Emulation = ROOMY) -> EmulatedDrive:
        drives.append(EmulatedDrive(tmp_path, shape, settings))
        return drives[-1]

    yield make
    for drive in drives:
        drive.close()
        drive.close()  # twice is fine
    assert not workers()
    assert not list(tmp_path.iterdir())
    assert len(list(Path("/proc/self/fd").iterdir())) <= before  # an earlier test's may have gone since


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hillinfer-worker"]


def filled(drive: EmulatedDrive, n: int, stream: int = 0, cold: bool = True) -> Model:
    model = Model(drive.shape, n)
    drive.write(stream, 0, *model.tokens(n))
    if cold:
        drive.hold(stream, np.arange(n), False)
        model.hot[:] = False
    return model


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_commands_matches_plain_numpy(data, tmp_path_factory):
    setting = data.draw(st.sampled_from([SPILLING, ROOMY]))
    drive = EmulatedDrive(tmp_path_factory.mktemp("drive"), SMALL, setting)
    models = [Model(SMALL, seed) for seed in range(SMALL.streams)]
    commands = st.sampled_from(["write", "write", "hold", "rescale", "truncate", "evaluate", "fetch"])
    for command in data.draw(st.lists(commands, min_size=5, max_size=40)):
        stream = data.draw(st.integers(0, 1)) * 3
        model, positions = models[stream], models[stream].some()
        if command == "write":
            drive.write(stream, len(model.records), *model.tokens(data.draw(st.integers(0, 200))))
        elif command == "hold":
            model.hot[positions] = hot = data.draw(st.booleans())
            drive.hold(stream, positions, hot)
        elif command == "rescale":
            doublings = model.rng.integers(0, 3, (2, 16)).astype(np.uint8)
            drive.rescale(stream, doublings)
            model.codes = np.rint(model.codes / 2.0 ** doublings[:, None]).astype(np.int8)
        elif command == "truncate":
            n = data.draw(st.integers(0, len(model.records)))
            drive.truncate(stream, n)
            model.truncate(n)
        elif command == "evaluate":
            query, block = model.query(), data.draw(st.sampled_from([1, 50, 64, 1000]))
            check_blocks(list(drive.begin_evaluate(stream, query, block)), model, query, block)
        else:
            np.testing.assert_array_equal(drive.fetch(stream, positions), model.records[positions])
    for stream, model in enumerate(models):
        query = model.query()
        check_blocks(list(drive.begin_evaluate(stream, query, 100)), model, query, 100)
        np.testing.assert_array_equal(drive.fetch(stream, np.arange(len(model.records))), model.records)
    drive.close()


@pytest.mark.parametrize("head_dim", [128, 1040])
@pytest.mark.parametrize("extreme", [False, True])
def test_scores_are_exact_at_the_extremes(open_drive, head_dim, extreme):
    """At +-127 and head_dim 1,040 the sum is the last that fp32 holds exactly: 1,040 * 127 * 127 < 2**24."""
    drive = open_drive(Shape(1, 1, 4096, 2, head_dim))
    model = Model(drive.shape, 0)
    drive.write(0, 0, *model.tokens(300, extreme))
    codes = np.full((2, 2, head_dim), 127, np.int8)
    codes[:, 1, 0] = 126
    drive.write(0, 300, np.zeros((2, 4096), np.uint8), codes)
    model.codes, model.hot = np.concatenate((model.codes, codes), 1), np.zeros(302, bool)
    drive.hold(0, np.arange(302), False)
    query = model.query(extreme=extreme)
    check_blocks(list(drive.begin_evaluate(0, query)), model, query, 1024)


def test_codes_beyond_the_memory_come_from_the_file_with_the_same_bits(open_drive):
    drives = [open_drive(settings=setting) for setting in (SPILLING, ROOMY)]
    models = [filled(drive, 2000) for drive in drives]
    query = models[0].query()
    for drive, model in zip(drives, models, strict=True):
        check_blocks(list(drive.begin_evaluate(0, query, 300)), model, query, 300)
    spilled, kept = (drive.report()["evaluate"] for drive in drives)
    assert kept.nand_bytes == 0 and kept.dram_bytes == spilled.dram_bytes == 2000 * SMALL.code_bytes
    assert spilled.nand_bytes == 30 * 4096  # of 31 full pages one stays; each is read once, whatever the block
    drives[0].truncate(0, 0)
    model = filled(drives[0], 2000)
    check_blocks(list(drives[0].begin_evaluate(0, query, 300)), model, query, 300)
    drives[0].rescale(0, np.zeros((2, 16), np.uint8))
    report = drives[0].report()
    assert report["evaluate"].nand_bytes == 60 * 4096  # a truncation gave its memory back, and no more than that
    assert report["rescale"].nand_bytes == 2 * 30 * 4096


def test_rescaled_codes_follow_key_codes(open_drive):
    """The recipe for the host: what `KeyCodes.append` does to its old codes, the drive does too."""
    drive = open_drive(Shape(1, 1, 256, 2, 16))
    host = KeyCodes(1, 2, 16)
    torch.manual_seed(0)
    for step in range(6):
        before, n = host.scale.clone(), host.codes.n
        host.append(torch.randn(1, 2, 90, 16) * 3**step)
        if n:
            drive.rescale(0, torch.log2(host.scale / before)[0, :, 0].round().to(torch.uint8).numpy())
        drive.write(0, n, np.zeros((90, 256), np.uint8), host.codes.view()[0, :, n:].numpy())
    n = host.codes.n
    drive.hold(0, np.arange(n), False)
    query = host.query(torch.randn(4, 16), 0)[0]
    (block,) = drive.begin_evaluate(0, query.numpy())
    np.testing.assert_array_equal(block.scores, host.scorer(query, 0)(None))


def test_the_host_works_while_the_drive_scores(open_drive):
    """Blocks come one by one, the drive goes on while the host runs Python, and later commands queue."""
    drive = open_drive(settings=Emulation(rates=SLOW, paced=True))
    model = filled(drive, 1000)
    query = model.query()
    evaluation = drive.begin_evaluate(0, query, 100)
    fetch = drive.begin_fetch(0, np.arange(64))
    drive.hold(0, np.arange(1000), True)
    begun = time.perf_counter_ns()
    blocks = [next(evaluation)]
    first = time.perf_counter_ns()
    while time.perf_counter_ns() < first + 10**8:  # pure Python
        pass
    busy = time.perf_counter_ns()
    blocks += list(evaluation)
    check_blocks(blocks, model, query, 100)
    assert begun < first < busy < evaluation.work.end_ns
    np.testing.assert_array_equal(fetch.result(), model.records[:64])
    assert fetch.work.start_ns >= evaluation.work.end_ns
    assert list(drive.begin_evaluate(0, query)) == []


def test_threads_share_a_drive(open_drive, monkeypatch):
    """Also through a queue that holds little at a time, so that commands wait for room."""
    monkeypatch.setattr(worker, "QUEUED", 1 << 16)
    drive = open_drive(settings=Emulation(page_bytes=2048, dram_bytes=8 * 4096, timeout=20))
    errors = []

    def work(stream: int) -> None:
        try:
            model = Model(SMALL, stream)
            for n in (400, 1, 90, 250):
                drive.write(stream, len(model.records), *model.tokens(n))
                positions, query = model.some(), model.query()
                drive.hold(stream, positions, False)
                model.hot[positions] = False
                evaluation, fetch = drive.begin_evaluate(stream, query, 60), drive.begin_fetch(stream, positions)
                np.testing.assert_array_equal(fetch.result(), model.records[positions])
                check_blocks(list(evaluation), model, query, 60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_writes_wait_for_a_slow_drive(open_drive, monkeypatch):
    """A host that writes faster than the drive does not queue its whole prompt, and its buffers are its own."""
    monkeypatch.setattr(worker, "QUEUED", 1 << 18)
    monkeypatch.setattr(worker, "CHUNK", 1 << 16)
    slow = Rates(nand_read=1e9, nand_write=1e9, dram_read=1e9, link=8e6)
    drive, model = open_drive(settings=Emulation(rates=slow, paced=True)), Model(SMALL, 0)
    records, codes = model.tokens(2000)
    start = time.monotonic()
    drive.write(0, 0, records, codes)
    assert time.monotonic() - start > 0.5 * 1.6e6 / 8e6  # 1.6 MB, of which 0.26 may be queued
    assert drive._worker.queued <= 1 << 18
    codes[:] = 0
    records[:] = 0
    np.testing.assert_array_equal(drive.fetch(0, np.arange(2000)), model.records)
    assert drive._worker.queued == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernels", [True, False])
def test_attention_in_the_drive_equals_softmax(open_drive, monkeypatch, dtype, kernels):
    """Over runs that cross chunks, file and tail; the logsumexp of nothing is that of an empty sum."""
    monkeypatch.setattr(worker, "CHUNK", 1 << 16)
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    kv = torch.randn(1500, 2, 2, 16).to(kind)  # n, K and V, Hkv, D
    raw = kv.view(torch.uint8).reshape(1500, -1).numpy()
    drive = open_drive(Shape(2, 1, raw.shape[1], 2, 0))
    drive.write(1, 0, raw, np.zeros((2, 1500, 0), np.int8))
    query = torch.randn(2, 3, 16)
    for runs in ([(0, 1500)], [(3, 4), (90, 1300), (1490, 1500)], []):
        call = drive.begin_attend(1, query.numpy(), np.array(runs, np.int64).reshape(-1, 2), dtype)
        out, logsumexp = call.result()
        chosen = torch.cat([kv[a:b] for a, b in runs] or [kv[:0]]).float()
        logits = query @ chosen[:, 0].permute(1, 2, 0)
        torch.testing.assert_close(logsumexp, logits.logsumexp(-1))
        torch.testing.assert_close(out, logits.softmax(-1) @ chosen[:, 1].transpose(0, 1), rtol=1e-5, atol=1e-5)
        assert (call.work.nand_bytes > 0) == bool(runs) and call.work.link_bytes == 4 * 6 * (16 + 16 + 1)


def test_pacing_changes_time_and_no_bits(open_drive):
    reports, answers = [], []
    for paced in (False, True):
        drive = open_drive(settings=Emulation(page_bytes=2048, dram_bytes=8 * 4096, rates=SLOW, paced=paced))
        model = filled(drive, 1000)
        evaluation = drive.begin_evaluate(0, model.query(), 128)
        blocks = list(evaluation)
        answers.append((np.concatenate([part.scores for part in blocks], 1), drive.fetch(0, model.some())))
        reports.append(drive.report())
        took = (evaluation.work.end_ns - evaluation.work.start_ns) / 1e9
        assert not paced or took >= evaluation.work.modelled_s > evaluation.work.measured_s
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    for kind in ("write", "evaluate", "fetch"):
        free, paced = (report[kind] for report in reports)
        for name in ("calls", "nand_bytes", "dram_bytes", "link_bytes", "modelled_s"):  # of bytes and rates alone
            assert getattr(free, name) == getattr(paced, name)
        assert free.measured_s != paced.measured_s
    work = reports[0]["evaluate"]
    assert work.link_bytes == 2 * 3 * 16 + 1000 * 4 * (1 + 2 * 3)
    parts = work.nand_bytes / SLOW.nand_read, work.dram_bytes / SLOW.dram_read, work.link_bytes / SLOW.link
    assert max(parts) <= work.modelled_s <= sum(parts)
    assert reports[0]["rescale"].calls == 0


def test_a_drive_that_closes_amid_its_work_ends_all_calls(open_drive):
    """Also in the midst of a pause of ten minutes."""
    drive = open_drive(settings=Emulation(rates=replace(SLOW, dram_read=1e3), paced=True))
    model = filled(drive, 100)
    evaluation, fetch = drive.begin_evaluate(0, model.query(), 10), drive.begin_fetch(0, np.arange(9))
    next(evaluation)
    start = time.monotonic()
    drive.close()
    assert time.monotonic() - start < 5
    for call in (lambda: list(evaluation), fetch.result, lambda: drive.hold(0, np.arange(3), True), drive.report):
        for _ in range(2):  # an error is not waited for a second time
            with pytest.raises(DriveError, match="closed"):
                call()


@pytest.mark.parametrize("engine", ["threads"] if ring.why_not() else ["io_uring", "threads"])
def test_a_silent_file_is_an_error_in_time_that_names_the_place(open_drive, engine):
    drive = open_drive(settings=Emulation(timeout=0.2, engine=engine))
    filled(drive, 2000, stream=3)
    drive.report()
    faulty = FaultyDrive("stuck read")
    faulty.install(drive._worker.file)
    start = time.monotonic()
    with pytest.raises(DriveError, match=r"layer 1, sequence 1, position 0: no answer for 0.2 s"):
        drive.fetch(3, np.arange(3))
    assert time.monotonic() - start < 5
    faulty.remove()
    drive.close()
    ring.release_stuck()
    for thread in threading.enumerate():
        if thread.name == "hillinfer-stuck":  # closes the file once its reads have returned
            thread.join(5)


def test_a_full_disk_fails_the_next_call(open_drive):
    drive = open_drive()
    model = Model(SMALL, 0)
    FaultyDrive("full").install(drive._worker.file)
    drive.write(0, 0, *model.tokens(100))
    with pytest.raises(DriveError, match=r"no room for [\d,]+ bytes"):
        drive.report()
    with pytest.raises(DriveError, match="no room"):
        drive.truncate(0, 0)


def test_a_failed_result_fails_only_its_own_call(open_drive):
    drive = open_drive()
    model = filled(drive, 100)
    drive.report()
    FaultyDrive("read error", 0, 0, np.zeros(4, np.int64)).install(drive._worker.file)
    with pytest.raises(DriveError, match=r"layer 0, sequence 0, position 0: .*Input/output error"):
        drive.fetch(0, np.arange(100))
    np.testing.assert_array_equal(drive.fetch(0, np.arange(100)), model.records)


def test_what_cannot_be_right_is_refused_at_once(open_drive, tmp_path):
    drive = open_drive()
    model = filled(drive, 10)
    records, codes = model.tokens(2)
    for call, words in [
        (lambda: drive.write(0, 11, records, codes), "holds 10 tokens"),
        (lambda: drive.write(0, 10, records, codes[:, :1]), "codes must be int8"),
        (lambda: drive.write(0, 10, records.view(np.int8), codes), "records must be uint8"),
        (lambda: drive.hold(0, np.array([10]), True), "below 10"),
        (lambda: drive.fetch(0, np.array([3, 3])), "distinct"),
        (lambda: drive.begin_evaluate(0, model.query().astype(np.int16)), "query must be int8"),
        (lambda: drive.begin_evaluate(0, model.query(), 0), "at least one token"),
        (lambda: drive.begin_attend(0, model.query(), np.array([[0, 11]]), "float32"), r"within \[0, 10\)"),
        (lambda: drive.begin_attend(0, model.query(), np.array([[0, 10]]), "float64"), "float64 one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    np.testing.assert_array_equal(drive.fetch(0, np.arange(10)), model.records[:10])  # and none of it did harm
    with pytest.raises(DriveError, match="raise dram_bytes"):
        open_drive(settings=Emulation(dram_bytes=4096))
    with pytest.raises(DriveError, match="nowhere"):
        EmulatedDrive(tmp_path / "nowhere", SMALL)
    drive.close()
    with pytest.raises(DriveError, match="closed"):
        drive.fetch(0, np.arange(3))


def test_a_collected_drive_ends_also_where_its_own_thread_collects_it(tmp_path):
    drive = EmulatedDrive(tmp_path, SMALL, ROOMY)
    thread, gone = drive._worker.thread, threading.Event()
    circle = [drive]
    circle.append(circle)
    drive._worker.report = lambda meter: gone.wait(20) and gc.collect()
    drive._worker.submit("report")
    del drive, circle
    gone.set()
    thread.join(20)
    assert not thread.is_alive() and not list(tmp_path.iterdir())


def test_ctrl_c_while_it_waits_does_no_harm(open_drive):
    """Interrupted at random moments of submitting and waiting, the drive goes on, and closes."""
    drive = open_drive()
    model = filled(drive, 500)
    query, interrupts = model.query(), 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3), 1)  # again where one was swallowed
            while True:
                list(drive.begin_evaluate(0, query, 50))
                drive.fetch(0, np.arange(20))
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 200
    check_blocks(list(drive.begin_evaluate(0, query, 50)), model, query, 50)


@pytest.fixture(autouse=True)
def alarm_is_ctrl_c():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_forked_process_is_refused_and_does_no_harm(open_drive):
    drive = open_drive(settings=Emulation(rates=SLOW, paced=True))
    model = filled(drive, 100)
    query = model.query()
    evaluation = drive.begin_evaluate(0, query, 10)  # at work while it forks
    child = os.fork()
    if child == 0:
        try:
            drive.fetch(0, np.arange(3))
        except DriveError as error:
            drive.close()
            os._exit(0 if "fork" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check_blocks(list(evaluation), model, query, 10)
    np.testing.assert_array_equal(drive.fetch(0, np.arange(100)), model.records)


HOST = """
import sys, time, numpy as np
from pathlib import Path
from hillinfer.systems.hillinfer.drive import EmulatedDrive
from hillinfer.systems.hillinfer.protocol import Emulation, Rates, Shape
slow = Rates(nand_read=1e6, nand_write=1e9, dram_read=100, link=1e9)
drive = EmulatedDrive(Path(sys.argv[1]), Shape(1, 1, 256, 2, 16), Emulation(rates=slow, paced=sys.argv[2] == "paced"))
drive.write(0, 0, np.zeros((100, 256), np.uint8), np.zeros((2, 100, 16), np.int8))
print("ready", flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError
drive.report()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, None])
def test_the_drive_ends_with_its_host(end, tmp_path):
    """Killed (while the drive is paced through half a minute of work), interrupted, or out of an exception."""
    command = [sys.executable, "-c", HOST, tmp_path, "paced" if end else "raise"]
    host = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert host.stdout.readline() == "ready\n"
    if end:
        host.send_signal(end)
    assert host.wait(10) != 0
    host.stdout.close()
    assert not list(tmp_path.iterdir())
