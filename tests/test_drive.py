"""The drive's contract: any set of positions reads back equal to the bit, short transfers are survived, nothing stays.

`RecordFile` moves bytes, `RecordLog` keeps tensors on it. Faults come from an engine that fails.
"""

import errno
import os
import stat
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.faulty_drive import FaultyDrive
from hillinfer.errors import DriveError
from hillinfer.native import ring
from hillinfer.tiers.block_file import BLOCK, MAX_READ
from hillinfer.tiers.engines import ENGINES, Threads
from hillinfer.tiers.geometry import Geometry
from hillinfer.tiers.log import RecordLog, Writer
from hillinfer.tiers.record_file import RecordFile

# Records smaller than a block, larger, equal to it, and such that neither divides the other.
SHAPES = {"256 B": (2, 16), "768 B": (3, 32), "4 KiB": (8, 64), "12 KiB": (12, 128)}
BYTES = {name: 2 * heads * dim * 4 for name, (heads, dim) in SHAPES.items()}


def geometry(kv_heads=2, head_dim=16, dtype=torch.float32, batch=1):
    return Geometry(batch, kv_heads, head_dim, dtype, torch.device("cpu"))


def open_file(folder, size: Geometry, streams: int = 1, **options) -> RecordFile:
    return RecordFile(folder, size.record_bytes, streams, size.batch, **options)


def random_bytes(n: int, width: int = BLOCK) -> np.ndarray:
    """Records as a file takes them: (n, width) uint8."""
    return torch.randint(0, 256, (n, width), dtype=torch.uint8).numpy()


def random_records(shape: Geometry, n: int) -> torch.Tensor:
    """Random bits, not numbers: NaN patterns must survive too."""
    return torch.from_numpy(random_bytes(n, shape.record_bytes)).view(shape.dtype).view(n, *shape.record_shape)


def read(file: RecordFile, stream: int, positions) -> np.ndarray:
    """A copy of the records, (k, record_bytes)."""
    records, rows, _ = file.read_in_place(stream, np.asarray(positions))
    return records.copy() if rows is None else records[rows]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


NAMES = [
    "threads",
    pytest.param("io_uring", marks=pytest.mark.skipif(bool(ring.why_not()), reason=str(ring.why_not()))),
]


@pytest.fixture(params=NAMES)
def engine(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    assert not list(tmp_path.iterdir()), "a file was left in the drive folder"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logs_read_back_to_the_bit(shape, dtype, folder, engine):
    torch.manual_seed(0)
    size = geometry(*shape, dtype, batch=2)
    file = open_file(folder, size, streams=4, engine=engine)
    assert engine in file.engine.name
    logs = [RecordLog(file, size, i) for i in range(4)]
    wanted = [size.empty(0) for _ in logs]
    for n in (300, 1, 1, 63, 1700, 5):  # the fifth outgrows the first segment
        for i, log in enumerate(logs):
            records = random_records(size, n)
            log.append(records)
            wanted[i] = torch.cat((wanted[i], records))
    rng = np.random.default_rng(0)
    for log, want in zip(logs, wanted, strict=True):
        assert log.n == len(want)
        for k in (1, 2, 7, 200, len(want)):
            positions = np.sort(rng.choice(len(want), k, replace=False))
            assert same(log.read(positions)[0].tensor(), want[torch.from_numpy(positions)])
        nothing, nbytes = log.read(np.zeros(0, np.int64))
        assert nothing.tensor().shape == (0, *size.record_shape) and nbytes == 0
    file.close()


@given(data=st.data(), behind=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_appends_reads_and_truncations(data, behind, tmp_path_factory, engine):
    size = geometry(*data.draw(st.sampled_from(list(SHAPES.values()))))
    file = open_file(tmp_path_factory.mktemp("drive"), size, engine=engine)
    writer = Writer() if behind else None
    log, want = RecordLog(file, size, 0, writer), size.empty(0)
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()) or not len(want):
            records = random_records(size, data.draw(st.integers(1, 200)))
            log.append(records)
            want = torch.cat((want, records))
        else:
            n = data.draw(st.integers(0, len(want)))
            log.truncate(n)
            want = want[:n]
        positions = np.flatnonzero(np.random.default_rng(len(want)).random(len(want)) < 0.3)
        assert same(log.read(positions)[0].tensor(), want[torch.from_numpy(positions)])
    if writer:
        writer.close()
    file.close()


def test_the_file_is_private_unlinked_and_direct(folder):
    file = open_file(folder, geometry())
    status = os.fstat(file.fd)
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 0
    assert not list(folder.iterdir())
    if file.direct:
        import fcntl

        assert fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT
    file.close()
    file.close()  # twice is fine


def test_without_o_direct_it_is_buffered_with_a_warning(folder, monkeypatch, engine):
    """Where the system has no such flag; a file system that refuses it goes the same way."""
    monkeypatch.delattr(os, "O_DIRECT")
    with pytest.warns(UserWarning, match="O_DIRECT"):
        file = RecordFile(folder, BLOCK, 1, engine=engine)
    assert not file.direct and "page cache" in file.about
    records = random_bytes(64)
    file.write(0, 0, records)
    assert np.array_equal(read(file, 0, np.arange(64)), records)
    file.close()


def test_neighbours_are_joined_and_reads_stay_below_a_mebibyte(folder):
    calls = []

    def noted(fd, buffers, at):
        calls.append((at, len(buffers[0])))
        return os.preadv(fd, buffers, at)

    file, records = RecordFile(folder, BLOCK, 1, engine=Threads(4, read=noted)), random_bytes(1024)
    file.write(0, 0, records)
    near = np.array([10, 11, 14, 17])  # gaps of two records, 8 KiB, are joined
    got, rows, nbytes = file.read_in_place(0, near)
    assert len(calls) == 1 and calls[0][1] == 8 * BLOCK == nbytes
    assert np.array_equal(got[rows], records[near])
    calls.clear()
    read(file, 0, [10, 14])  # a gap of three is not
    assert sorted(length for _, length in calls) == [BLOCK, BLOCK]
    calls.clear()
    read(file, 0, np.arange(1024))
    assert len(calls) == 4 and all(length <= MAX_READ and at % BLOCK == 0 for at, length in calls)
    file.close()


@pytest.mark.parametrize("width", BYTES.values(), ids=BYTES)
def test_records_are_read_in_place(width, folder, engine):
    file, records = RecordFile(folder, width, 2, engine=engine), random_bytes(512, width)
    file.write(1, 0, records)
    first, second = np.array([0, 1, 3, 90, 91, 300, 511]), np.arange(7, 500, 5)
    for _ in range(3):
        one, rows, nbytes = file.read_in_place(1, first)
        other, places, _ = file.read_in_place(1, second)  # must not be read over what is still in use
        assert np.array_equal(one if rows is None else one[rows], records[first])
        assert np.array_equal(other if places is None else other[places], records[second])
        copied = width % BLOCK != 0 and BLOCK % width != 0
        assert (rows is None) == copied and nbytes % BLOCK == 0
        del one, other
        assert len({id(buffer) for buffer in file._buffers}) == len(file._buffers) == (1 if rows is None else 2)
    assert file.read_in_place(1, np.zeros(0, np.int64))[0].shape == (0, width)
    file.close()


def test_a_log_reads_in_place(folder, engine):
    """A tensor over the I/O buffer keeps it from being read over, and gives it back with the last reference."""
    size = geometry(8, 64)
    file, records = open_file(folder, size, engine=engine), random_records(size, 512)
    log = RecordLog(file, size, 0)
    log.append(records)
    one, _ = log.read(np.array([5, 9, 400]))
    kept = one.data
    del one
    assert not file._buffers
    other, _ = log.read(np.arange(100, 200))
    assert same(kept[[0]], records[[5]]) and same(other.tensor(), records[100:200])
    del kept, other
    assert len(file._buffers) == 2
    file.close()


def test_short_transfers_are_continued(folder):
    """Every call moves one block of what it was asked for."""
    threads = Threads(
        4,
        read=lambda fd, buffers, at: os.preadv(fd, [buffers[0][:BLOCK]], at),
        write=lambda fd, buffers, at: os.pwritev(fd, [buffers[0][:BLOCK]], at),
    )
    file, records = RecordFile(folder, BLOCK, 1, engine=threads), random_bytes(40)
    file.write(0, 0, records)
    assert np.array_equal(read(file, 0, np.arange(40)), records)
    file.close()


@pytest.mark.parametrize(
    ("stream", "there", "place"), [(0, 100, "layer 0, sequence 0, position 300"), (3, 300, "layer 1")]
)
def test_a_file_that_ends_early_says_where(folder, engine, stream, there, place):
    """A real short read: the pieces before the end come, one comes in part, and then there is no more."""
    file = RecordFile(folder, BLOCK, 4, 2, engine=engine)
    file.write(stream, 0, random_bytes(1024))
    assert len(read(file, stream, np.arange(0, 1024, 4))) == 256
    os.ftruncate(file.fd, int(file.offsets(stream, np.array([there]))[0]) + BLOCK)
    with pytest.raises(DriveError, match=f"read failed at {place}.*only 0 of 4096 bytes"):
        read(file, stream, np.array([0, 50, 300, 600]) + there - 100 * (stream == 0))
    with pytest.raises(DriveError, match="only 4096 of 8192 bytes"):
        read(file, stream, np.array([there, there + 1]))
    file.close()


def test_a_refused_write_says_where(folder, engine):
    file = RecordFile(folder, BLOCK, 1, engine=engine)
    fd, file.fd = file.fd, os.open(folder, os.O_RDONLY)
    with pytest.raises(DriveError, match="write failed at layer 0, sequence 0, position 0"):
        file.transfer("write", [(0, np.zeros(BLOCK, np.uint8))], 0, 0)
    os.close(file.fd)
    file.fd = fd
    file.close()


def test_engines_move_the_same_bits_in_as_many_requests(folder):
    width = BYTES["768 B"]
    records, moved = random_bytes(4000, width), []
    for engine in ("threads", "auto"):
        file = RecordFile(folder, width, 1, engine=engine)
        file.write(0, 0, records[: 4000 // file.group * file.group])
        positions = np.flatnonzero(np.random.default_rng(1).random(3900) < 0.2)
        assert np.array_equal(read(file, 0, positions), records[positions])
        moved.append(file.reads)
        file.close()
    assert moved[0] == moved[1]


def test_many_threads_read_at_once(folder, engine):
    file, records = RecordFile(folder, BLOCK, 1, engine=engine), random_bytes(2048)
    file.write(0, 0, records)
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            positions = np.flatnonzero(rng.random(2048) < 0.2)
            if not np.array_equal(read(file, 0, positions), records[positions]):
                wrong.append(seed)

    readers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    file.close()
    assert not wrong


def test_without_io_uring_threads_take_over(folder, monkeypatch):
    def refuse(threads):
        raise OSError(errno.ENOSYS, "no io_uring here")

    monkeypatch.setitem(ENGINES, "io_uring", refuse)
    file = RecordFile(folder, BLOCK, 1)
    assert file.engine.name == "16 threads"
    file.close()
    with pytest.raises(DriveError, match="no io_uring here"):
        RecordFile(folder, BLOCK, 1, engine="io_uring")


@pytest.mark.parametrize("answer", [0, errno.EIO])
def test_a_failed_read_says_where(folder, answer):
    def broken(fd, buffers, at):
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    file = RecordFile(folder, BLOCK, 6, 2, engine=Threads(4, read=broken))
    file.write(5, 0, random_bytes(8))
    with pytest.raises(DriveError, match="layer 2, sequence 1, position 3"):
        read(file, 5, [3, 4])
    file.close()


def test_of_several_errors_the_first_in_the_file_is_told(folder):
    """Whatever thread fails first."""

    def broken(fd, buffers, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = RecordFile(folder, BLOCK, 1, engine=Threads(4, read=broken))
    file.write(0, 0, random_bytes(512))
    with pytest.raises(DriveError, match="position 20:"):
        read(file, 0, [20, 120, 220, 320, 420])
    file.close()


def test_a_full_disk_says_so_and_leaves_nothing(folder, engine):
    file = RecordFile(folder, BLOCK, 1, engine=engine)
    FaultyDrive("full").install(file)
    with pytest.raises(DriveError, match="No space left"):
        file.write(0, 0, random_bytes(64))
    assert file.size == file.capacity == 0
    file.close()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_fallocate_the_file_is_extended(folder, engine, code, monkeypatch):
    """ext3, NFS, 9p, ZFS, exFAT."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    file, data = RecordFile(folder, BLOCK, 1, engine=engine), random_bytes(600)
    file.write(0, 0, data)
    assert (read(file, 0, range(600)) == data).all()
    with pytest.raises(DriveError, match=r"no room for .*No space left"):
        file.allocate(1 << 60)
    file.close()


def test_a_read_during_a_write_is_served_from_memory(folder):
    """The write is stopped in its middle; a reader gets every record, and memory is freed once it is through."""
    go, reached = threading.Event(), threading.Event()

    def slow(fd, buffers, at):
        reached.set()
        assert go.wait(10)
        return os.pwritev(fd, buffers, at)

    size = geometry(8, 64)
    file, writer = open_file(folder, size, engine=Threads(4, write=slow)), Writer()
    log, records = RecordLog(file, size, 0, writer), random_records(size, 300)
    assert log.append(records[:200]) == 200 * size.record_bytes
    assert reached.wait(10)
    log.append(records[200:])
    assert log.state[0] == 0 and same(log.read(np.arange(300))[0].tensor(), records)
    go.set()
    log.flush()
    assert log.state[0] == 200 and log.nbytes == 100 * size.record_bytes
    assert same(log.read(np.arange(300))[0].tensor(), records)
    writer.close()
    file.close()


def test_a_failed_write_behind_is_raised_and_loses_nothing(folder):
    def broken(fd, buffers, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    size = geometry(8, 64)
    file, writer = open_file(folder, size, engine=Threads(4, write=broken)), Writer()
    log, records = RecordLog(file, size, 0, writer), random_records(size, 300)
    log.append(records)
    with pytest.raises(DriveError, match="write failed at layer 0"):
        log.flush()
    assert same(log.read(np.arange(300))[0].tensor(), records)
    writer.close()
    file.close()


def test_writing_behind_is_bounded():
    writer, go, order = Writer(behind=100), threading.Event(), []
    writer.submit(80, lambda: go.wait(10))
    late = threading.Thread(target=lambda: writer.submit(80, lambda: order.append("second")))
    late.start()
    late.join(0.2)
    assert late.is_alive() and not order  # no room for a second one yet
    go.set()
    late.join(10)
    writer.close()
    assert order == ["second"]
