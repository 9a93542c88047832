"""A corrupted block raises an error that names its place on every path to a drive, and is never returned as data."""

import os
import zlib

import numpy as np
import pytest
from hillinfer.tiers.drive import DirectDrive

from hillinfer import native
from hillinfer.errors import DriveError
from hillinfer.tiers import checksums
from hillinfer.tiers.checksums import BLOCK, Checksums
from tests.test_drive import ENGINES, geometry, random_records, same


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
        monkeypatch.setattr(native._library, "isa", native.ISAS.index(isa))
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
    assert sums.check(*pieces(buffer, [(3, 0, 4)])) is None
    buffer[2 * BLOCK] = 0
    assert sums.check(*pieces(buffer, [(3, 0, 4)])) == 5 * BLOCK
    assert sums.check(*pieces(buffer, [(100, 0, 4)])) is None  # never written: nothing to compare with


@pytest.mark.parametrize("engine", ENGINES)
def test_any_flipped_bit_is_found_with_its_place(tmp_path, engine):
    """Bits of the file itself; and where a position is asked for beside it, the neighbours are still given."""
    size = geometry(8, 64, batch=2)  # a record is a block
    drive, records = DirectDrive(tmp_path, size, streams=4, engine=engine), random_records(geometry(8, 64), 512)
    drive.write(3, 0, records)
    everything, rng = np.arange(512), np.random.default_rng(1)
    for token in rng.integers(0, 512, 40):
        at = int(drive.offsets(3, np.array([token]))[0])
        flip(drive.fd, at, int(rng.integers(BLOCK * 8)))
        with pytest.raises(DriveError, match=f"layer 1, sequence 1, position {token}: .*not what was written"):
            drive.read(3, everything)
        assert same(drive.read(3, everything[everything > token + 2])[0], records[token + 3 :])
        drive.write(3, token, records[token : token + 1])  # written anew it is whole again
    assert same(drive.read(3, everything)[0], records)
    drive.close()


def test_stale_and_misplaced_blocks_are_found(tmp_path):
    """A write that the drive lost, and one that it put elsewhere: each block is whole, but not the right one."""
    drive, records = DirectDrive(tmp_path, geometry(8, 64), streams=1), random_records(geometry(8, 64), 64)
    drive.write(0, 0, records)
    old = os.pread(os.open(f"/proc/self/fd/{drive.fd}", os.O_RDONLY), BLOCK, 5 * BLOCK)
    drive.write(0, 5, random_records(drive.geometry, 1))
    with open(f"/proc/self/fd/{drive.fd}", "r+b", buffering=0) as file:  # noqa: PTH123
        os.pwrite(file.fileno(), old, 5 * BLOCK)
        os.pwrite(file.fileno(), old, 9 * BLOCK)
    for token in (5, 9):
        with pytest.raises(DriveError, match=f"position {token}"):
            drive.read(0, np.array([token]))
    drive.close()


def test_checksums_can_be_turned_off(tmp_path):
    drive = DirectDrive(tmp_path, geometry(8, 64), streams=1, checksums=False)
    drive.write(0, 0, random_records(drive.geometry, 64))
    flip(drive.fd, 0, 5)
    assert drive.sums is None and len(drive.read(0, np.arange(64))[0]) == 64
    drive.close()


def flip(fd: int, at: int, bit: int) -> None:
    """Flip one bit of an open file that has no name, past O_DIRECT's rules."""
    with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:  # noqa: PTH123
        byte = os.pread(file.fileno(), 1, at + bit // 8)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), at + bit // 8)
        os.fsync(file.fileno())  # what reads around the page cache must see it
