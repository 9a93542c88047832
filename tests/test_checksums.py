"""A corrupted block raises an error that names its place on every path to a drive, and is never returned as data."""

import errno
import os
import zlib

import numpy as np
import pytest

from hillinfer import native
from hillinfer.errors import DriveError
from hillinfer.session_file import crc32
from hillinfer.tiers import checksums
from hillinfer.tiers.checksums import BLOCK, Checksums, compare
from hillinfer.tiers.record_file import RecordFile
from tests.test_drive import NAMES, random_bytes, read


def pieces(buffer: np.ndarray, spans: list[tuple[int, int, int]]) -> tuple[np.ndarray, ...]:
    """(block in the file, block in the buffer, blocks) as offsets, addresses and lengths."""
    at = np.array(spans, np.int64).reshape(-1, 3).T.copy() * BLOCK
    return at[0], at[1] + native.pointer(buffer), at[2]


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_the_kernel_is_zlibs_crc32(monkeypatch):
    """On every instruction set, unaligned memory included: what it notes and what it finds are the reference's."""
    rng = np.random.default_rng(0)
    buffer = rng.integers(0, 256, 40 * BLOCK + 3, dtype=np.uint8)[3:]
    buffer[:BLOCK], buffer[BLOCK : 2 * BLOCK] = 0, 255
    spans = [(7, 0, 9), (40, 9, 1), (2, 12, 3), (50, 20, 17)]
    wanted = np.zeros(80, np.uint32)
    assert checksums.reference(wanted, True, *pieces(buffer, spans)) == -1
    assert wanted[7] == zlib.crc32(bytes(BLOCK)) and np.count_nonzero(wanted) == 30
    for isa in native.isas():
        monkeypatch.setattr(native.library, "isa", native.ISAS.index(isa))
        sums = np.zeros(80, np.uint32)
        assert native.checksums(True, *pieces(buffer, spans), sums) == -1
        assert (sums == wanted).all()
        for bit in rng.integers(0, 37 * BLOCK * 8, 300):
            buffer[bit // 8] ^= 1 << bit % 8
            found = native.checksums(False, *pieces(buffer, spans), sums)
            assert found == checksums.reference(sums, False, *pieces(buffer, spans))
            hit = [b for b, place, n in spans if place <= bit // 8 // BLOCK < place + n]
            assert (found >= 0) == bool(hit)
            buffer[bit // 8] ^= 1 << bit % 8


def test_without_a_kernel_zlib_takes_over(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    sums, buffer = Checksums(), np.ones(4 * BLOCK, np.uint8)
    sums.note(*pieces(buffer, [(3, 0, 4)]))

    def check(block: int) -> None:
        offsets, addresses, lengths = pieces(buffer, [(block, 0, 4)])
        compare(sums.covering(offsets, lengths), offsets, addresses, lengths)

    check(3)
    buffer[2 * BLOCK] = 0
    with pytest.raises(OSError, match="damaged") as damaged:
        check(3)
    assert damaged.value.errno == errno.EBADMSG and damaged.value.offset == 5 * BLOCK
    check(100)  # never written: nothing to compare with


@pytest.mark.parametrize("engine", NAMES)
def test_any_flipped_bit_is_found_with_its_place(tmp_path, engine):
    """Bits of the file itself; and where a position is asked for beside it, the neighbours are still given."""
    file, records = RecordFile(tmp_path, BLOCK, 4, 2, engine=engine), random_bytes(512)  # a record is a block
    file.write(3, 0, records)
    everything, rng = np.arange(512), np.random.default_rng(1)
    for token in rng.integers(0, 512, 40):
        at = int(file.offsets(3, np.array([token]))[0])
        flip(file.fd, at, int(rng.integers(BLOCK * 8)))
        with pytest.raises(DriveError, match=f"layer 1, sequence 1, position {token}: .*not what was written"):
            read(file, 3, everything)
        assert np.array_equal(read(file, 3, everything[everything > token + 2]), records[token + 3 :])
        file.write(3, token, records[token : token + 1])  # written anew it is whole again
    assert np.array_equal(read(file, 3, everything), records)
    file.close()


def test_stale_and_misplaced_blocks_are_found(tmp_path):
    """A write that the drive lost, and one that it put elsewhere: each block is whole, but not the right one."""
    file = RecordFile(tmp_path, BLOCK, 1)
    file.write(0, 0, random_bytes(64))
    with open(f"/proc/self/fd/{file.fd}", "r+b", buffering=0) as raw:  # noqa: PTH123
        old = os.pread(raw.fileno(), BLOCK, 5 * BLOCK)
        file.write(0, 5, random_bytes(1))
        os.pwrite(raw.fileno(), old, 5 * BLOCK)
        os.pwrite(raw.fileno(), old, 9 * BLOCK)
    for token in (5, 9):
        with pytest.raises(DriveError, match=f"position {token}"):
            read(file, 0, [token])
    file.close()


def test_checksums_can_be_turned_off(tmp_path):
    file = RecordFile(tmp_path, BLOCK, 1, checksums=False)
    file.write(0, 0, random_bytes(64))
    flip(file.fd, 0, 5)
    assert file.sums is None and len(read(file, 0, np.arange(64))) == 64
    file.close()


def flip(fd: int, at: int, bit: int) -> None:
    """Flip one bit of an open file that has no name, past O_DIRECT's rules."""
    with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:  # noqa: PTH123
        byte = os.pread(file.fileno(), 1, at + bit // 8)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), at + bit // 8)
        os.fsync(file.fileno())  # what reads around the page cache must see it


@pytest.mark.parametrize("isa", native.isas())
def test_of_any_length_as_zlib(isa, monkeypatch):
    monkeypatch.setattr(native.library, "isa", native.ISAS.index(isa))
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    for n in (0, 1, 63, 64, 65, 127, 128, 4096, 4999):
        assert crc32(data[:n].tobytes()) == zlib.crc32(data[:n].tobytes())
