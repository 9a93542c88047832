"""One contract for drives: any set of positions reads back equal to the bit, short transfers are survived, nothing
stays.
"""

import errno
import os
import stat
import threading

import numpy as np
import pytest
import torch
from hillinfer.tiers.drive import DirectDrive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hillinfer.errors import DriveError
from hillinfer.native import ring
from hillinfer.tiers import drive as module
from hillinfer.tiers.geometry import BLOCK, Geometry
from hillinfer.tiers.log import Stream, Writer

# Records smaller than a block, larger, equal to it, and such that neither divides the other.
SHAPES = {"256 B": (2, 16), "768 B": (3, 32), "4 KiB": (8, 64), "12 KiB": (12, 128)}


def geometry(kv_heads=2, head_dim=16, dtype=torch.float32, batch=1):
    return Geometry(batch, kv_heads, head_dim, dtype, torch.device("cpu"))


def random_records(shape: Geometry, n: int) -> torch.Tensor:
    """Random bits, not numbers: NaN patterns must survive too."""
    bits = torch.randint(0, 256, (n, shape.record_bytes), dtype=torch.uint8)
    return bits.view(shape.dtype).view(n, *shape.record_shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


ENGINES = [
    "threads",
    pytest.param("io_uring", marks=pytest.mark.skipif(bool(ring.why_not()), reason=str(ring.why_not()))),
]


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    assert not list(tmp_path.iterdir()), "a file was left in the drive folder"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streams_read_back_to_the_bit(shape, dtype, folder, engine):
    torch.manual_seed(0)
    size = geometry(*shape, dtype, batch=2)
    drive = DirectDrive(folder, size, streams=4, engine=engine)
    assert drive.engine == engine
    streams = [Stream(drive, i) for i in range(4)]
    wanted = [size.empty(0) for _ in streams]
    for n in (300, 1, 1, 63, 1700, 5):  # the fifth outgrows the first segment
        for i, stream in enumerate(streams):
            records = random_records(size, n)
            stream.append(records)
            wanted[i] = torch.cat((wanted[i], records))
    rng = np.random.default_rng(0)
    for stream, want in zip(streams, wanted, strict=True):
        assert stream.n == len(want)
        for k in (1, 2, 7, 200, len(want)):
            positions = np.sort(rng.choice(len(want), k, replace=False))
            assert same(stream.read(positions)[0], want[torch.from_numpy(positions)])
        assert stream.read(np.zeros(0, np.int64))[0].shape == (0, *size.record_shape)
    drive.close()


@given(data=st.data(), behind=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_appends_reads_and_truncations(data, behind, tmp_path_factory, engine):
    size = geometry(*data.draw(st.sampled_from(list(SHAPES.values()))))
    drive = DirectDrive(tmp_path_factory.mktemp("drive"), size, streams=1, engine=engine)
    writer = Writer() if behind else None
    stream, want = Stream(drive, 0, writer), size.empty(0)
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()) or not len(want):
            records = random_records(size, data.draw(st.integers(1, 200)))
            stream.append(records)
            want = torch.cat((want, records))
        else:
            n = data.draw(st.integers(0, len(want)))
            stream.truncate(n)
            want = want[:n]
        positions = np.flatnonzero(np.random.default_rng(len(want)).random(len(want)) < 0.3)
        assert same(stream.read(positions)[0], want[torch.from_numpy(positions)])
    if writer:
        writer.close()
    drive.close()


def test_the_file_is_private_unlinked_and_direct(folder):
    drive = DirectDrive(folder, geometry(), streams=1)
    status = os.fstat(drive.fd)
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 0
    assert not list(folder.iterdir())
    if drive.direct:
        import fcntl

        assert fcntl.fcntl(drive.fd, fcntl.F_GETFL) & os.O_DIRECT
    drive.close()
    drive.close()  # twice is fine


def test_without_o_direct_it_is_buffered_with_a_warning(folder, monkeypatch, engine):
    real = os.open

    def refuse(name, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(name, flags, *rest)

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.warns(UserWarning, match="O_DIRECT"):
        drive = DirectDrive(folder, geometry(), streams=1, engine=engine)
    assert not drive.direct
    records = random_records(drive.geometry, 64)
    drive.write(0, 0, records)
    assert same(drive.read(0, np.arange(64))[0], records)
    drive.close()


def test_neighbours_are_joined_and_reads_stay_below_a_mebibyte(folder, monkeypatch):
    size = geometry(8, 64)  # 4 KiB records
    drive = DirectDrive(folder, size, streams=1, engine="threads")
    records = random_records(size, 1024)
    drive.write(0, 0, records)
    calls = []
    real = os.preadv
    monkeypatch.setattr(module.os, "preadv", lambda fd, b, at: calls.append((at, len(b[0]))) or real(fd, b, at))
    got, nbytes = drive.read(0, np.array([10, 11, 14, 17]))  # gaps of two records, 8 KiB, are joined
    assert len(calls) == 1 and calls[0][1] == 8 * BLOCK == nbytes
    assert same(got, records[[10, 11, 14, 17]])
    calls.clear()
    drive.read(0, np.array([10, 14]))  # a gap of three is not
    assert sorted(length for _, length in calls) == [BLOCK, BLOCK]
    calls.clear()
    drive.read(0, np.arange(1024))
    assert len(calls) == 4 and all(length <= module.MAX_READ and at % BLOCK == 0 for at, length in calls)
    drive.close()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_records_are_lent_where_they_were_read(shape, folder, engine):
    size = geometry(*shape)
    drive = DirectDrive(folder, size, streams=2, engine=engine)
    records = random_records(size, 512)
    drive.write(1, 0, records)
    want = lambda positions: records[torch.from_numpy(positions)]  # noqa: E731
    first, second = np.array([0, 1, 3, 90, 91, 300, 511]), np.arange(7, 500, 5)
    for _ in range(3):
        one, rows, nbytes = drive.lend(1, first)
        other, places, _ = drive.lend(1, second)  # must not be read over what is still held
        assert same(one if rows is None else one[torch.from_numpy(rows)], want(first))
        assert same(other if places is None else other[torch.from_numpy(places)], want(second))
        copied = size.record_bytes % BLOCK != 0 and BLOCK % size.record_bytes != 0
        assert (rows is None) == copied and nbytes % BLOCK == 0
        del one, other
        assert len({id(buffer) for buffer in drive._buffers}) == len(drive._buffers) == (1 if rows is None else 2)
    assert drive.lend(1, np.zeros(0, np.int64))[0].shape == (0, *size.record_shape)
    drive.close()


def test_short_transfers_are_continued(folder, monkeypatch):
    size = geometry(8, 64)
    drive = DirectDrive(folder, size, streams=1, engine="threads")
    real_read, real_write = os.preadv, os.pwritev
    monkeypatch.setattr(module.os, "preadv", lambda fd, b, at: real_read(fd, [b[0][:BLOCK]], at))
    monkeypatch.setattr(module.os, "pwritev", lambda fd, b, at: real_write(fd, [b[0][:BLOCK]], at))
    records = random_records(size, 40)
    drive.write(0, 0, records)
    assert same(drive.read(0, np.arange(40))[0], records)
    drive.close()


@pytest.mark.parametrize(
    ("stream", "there", "place"), [(0, 100, "layer 0, sequence 0, position 300"), (3, 300, "layer 1")]
)
def test_a_file_that_ends_early_says_where(folder, engine, stream, there, place):
    """A real short read: the pieces before the end come, one comes in part, and then there is no more."""
    size = geometry(8, 64, batch=2)
    drive = DirectDrive(folder, size, streams=4, engine=engine)
    drive.write(stream, 0, random_records(size, 1024))
    assert len(drive.read(stream, np.arange(0, 1024, 4))[0]) == 256
    os.ftruncate(drive.fd, int(drive.offsets(stream, np.array([there]))[0]) + BLOCK)
    with pytest.raises(DriveError, match=f"read failed at {place}.*only 0 of 4096 bytes"):
        drive.read(stream, np.array([0, 50, 300, 600]) + there - 100 * (stream == 0))
    with pytest.raises(DriveError, match="only 4096 of 8192 bytes"):
        drive.read(stream, np.array([there, there + 1]))
    drive.close()


def test_a_refused_write_says_where(folder, engine):
    drive = DirectDrive(folder, geometry(8, 64), streams=1, engine=engine)
    fd, drive.fd = drive.fd, os.open(folder, os.O_RDONLY)
    with pytest.raises(DriveError, match="write failed at layer 0, sequence 0, position 0"):
        drive.transfer("write", [(0, np.zeros(BLOCK, np.uint8))], 0, 0)
    os.close(drive.fd)
    drive.fd = fd
    drive.close()


def test_engines_move_the_same_bits_and_bytes(folder):
    size = geometry(3, 32)
    records, read = random_records(size, 4000), []
    for engine in ("threads", "auto"):
        drive = DirectDrive(folder, size, streams=1, engine=engine)
        drive.write(0, 0, records[: 4000 // size.group * size.group])
        positions = np.flatnonzero(np.random.default_rng(1).random(3900) < 0.2)
        read.append((*drive.read(0, positions), drive.reads, drive.bytes_read))
        assert same(read[-1][0], records[torch.from_numpy(positions)])
        drive.close()
    assert read[0][1:] == read[1][1:]


def test_many_threads_read_at_once(folder, engine):
    size = geometry(8, 64)
    drive, records = DirectDrive(folder, size, streams=1, engine=engine), random_records(size, 2048)
    drive.write(0, 0, records)
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            positions = np.flatnonzero(rng.random(2048) < 0.2)
            if not same(drive.read(0, positions)[0], records[torch.from_numpy(positions)]):
                wrong.append(seed)

    readers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    drive.close()
    assert not wrong


def test_without_io_uring_threads_take_over(folder, monkeypatch):
    def refuse(self, *args):
        raise OSError(errno.ENOSYS, "no io_uring here")

    monkeypatch.setattr(ring.Rings, "__init__", refuse)
    drive = DirectDrive(folder, geometry(), streams=1)
    assert drive.engine == "threads"
    drive.close()
    with pytest.raises(DriveError, match="no io_uring here"):
        DirectDrive(folder, geometry(), streams=1, engine="io_uring")


@pytest.mark.parametrize("answer", [0, errno.EIO])
def test_a_failed_read_says_where(folder, monkeypatch, answer):
    def broken(fd, buffers, at):
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    drive = DirectDrive(folder, geometry(8, 64, batch=2), streams=6, engine="threads")
    drive.write(5, 0, random_records(drive.geometry, 8))
    monkeypatch.setattr(module.os, "preadv", broken)
    with pytest.raises(DriveError, match="layer 2, sequence 1, position 3"):
        drive.read(5, np.array([3, 4]))
    drive.close()


def test_a_full_disk_says_so_and_leaves_nothing(folder, monkeypatch):
    def full(fd, at, n):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    drive = DirectDrive(folder, geometry(), streams=1)
    with pytest.raises(DriveError, match="No space left"):
        drive.write(0, 0, random_records(drive.geometry, 64))
    drive.close()


def test_a_read_during_a_write_is_served_from_memory(folder, monkeypatch):
    """The write is stopped in its middle; a reader gets every record, and memory is freed once it is through."""
    go, reached = threading.Event(), threading.Event()
    real = os.pwritev

    def slow(fd, buffers, at):
        reached.set()
        assert go.wait(10)
        return real(fd, buffers, at)

    monkeypatch.setattr(module.os, "pwritev", slow)
    size = geometry(8, 64)
    drive, writer = DirectDrive(folder, size, streams=1, engine="threads"), Writer()
    stream, records = Stream(drive, 0, writer), random_records(size, 300)
    assert stream.append(records[:200]) == 200 * size.record_bytes
    assert reached.wait(10)
    stream.append(records[200:])
    assert stream.state[0] == 0 and same(stream.read(np.arange(300))[0], records)
    go.set()
    stream.settle()
    assert stream.state[0] == 200 and stream.nbytes == 100 * size.record_bytes
    assert same(stream.read(np.arange(300))[0], records)
    writer.close()
    drive.close()


def test_a_failed_write_behind_is_raised_and_loses_nothing(folder, monkeypatch):
    def broken(fd, buffers, at):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    size = geometry(8, 64)
    drive, writer = DirectDrive(folder, size, streams=1, engine="threads"), Writer()
    stream, records = Stream(drive, 0, writer), random_records(size, 300)
    monkeypatch.setattr(module.os, "pwritev", broken)
    stream.append(records)
    with pytest.raises(DriveError, match="write failed at layer 0"):
        stream.settle()
    assert same(stream.read(np.arange(300))[0], records)
    writer.close()
    drive.close()


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
