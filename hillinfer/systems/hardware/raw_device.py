"""The direct path on a raw block device, and what keeps it from ever destroying somebody's data.

A device is written to only if it carries our stamp to the byte over its whole first MiB, where every common file
system, partition table and volume manager would have left a mark, and is not mounted, not held and not partitioned.
"""

import ctypes
import fcntl
import hashlib
import mmap
import os
import re
import stat
import struct
from pathlib import Path

from hillinfer.errors import DriveError
from hillinfer.tiers.block_file import BLOCK, BlockFile

STAMP = 1 << 20  # bytes at the start that are ours to recognise; data follows
GETSIZE64, DISCARD = 0x80081272, 0x1277  # ioctls BLKGETSIZE64, BLKDISCARD
SIGNATURES = [  # (what, offset, bytes): only to name what is there; what has no name here lacks the stamp all the same
    ("a GPT partition table", 512, b"EFI PART"),
    ("an ext2, ext3 or ext4 file system", 0x438, b"\x53\xef"),
    ("an XFS file system", 0, b"XFSB"),
    ("a Btrfs file system", 0x10040, b"_BHRfS_M"),
    ("an F2FS file system", 0x400, b"\x10\x20\xf5\xf2"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a FAT file system", 0x36, b"FAT"),
    ("a FAT32 file system", 0x52, b"FAT32"),
    ("an LVM volume", 512, b"LABELONE"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("a member of a RAID", 0x1000, b"\xfc\x4e\x2b\xa9"),
    ("swap space", 0xFF6, b"SWAPSPACE2"),
    ("a partition table", 0x1FE, b"\x55\xaa"),
]


class DeviceRefused(ValueError):
    """The device may hold something, or is in use. Nothing was written. The message names the fix."""


def check_device(path: str | Path, root: Path = Path("/")) -> int:
    """The size in bytes of a block device that is not in use and holds nothing we know. DeviceRefused otherwise.

    root   where /proc and /sys are found
    """
    path = Path(path)
    if not path.exists():
        raise DeviceRefused(f"{path} does not exist; name a block device, or leave it out to use a file")
    status = path.stat()
    if not stat.S_ISBLK(status.st_mode):
        raise DeviceRefused(f"{path} is no block device; name one, or leave it out to use a file")
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    system = root / "sys/dev/block" / number
    for part in sorted(system.glob("*/partition")):
        raise DeviceRefused(f"{path} has partitions ({part.parent.name}); name an empty device")
    holders = sorted(entry.name for entry in (system / "holders").glob("*"))
    if holders:
        raise DeviceRefused(f"{path} is held by {', '.join(holders)}; release it, or name another device")
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[2] == number:
            raise DeviceRefused(f"{path} is mounted on {words[4]}; unmount it, or name another device")
    for line in (root / "proc/swaps").read_text().splitlines()[1:]:
        if Path(line.split()[0]).exists() and Path(line.split()[0]).stat().st_rdev == status.st_rdev:
            raise DeviceRefused(f"{path} is swap space in use; name another device")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL)  # the kernel refuses O_EXCL where anything uses the device
    except OSError as error:
        raise DeviceRefused(f"{path} cannot be had alone ({error.strerror}); is it in use, or not yours?") from None
    try:
        start, size = os.pread(fd, STAMP, 0), _size(fd)
    finally:
        os.close(fd)
    for what, offset, magic in SIGNATURES:
        if start[offset : offset + len(magic)] == magic:
            raise DeviceRefused(f"{path} holds {what}; name an empty device (wipefs -a {path} would destroy it)")
    if size < 2 * STAMP:
        raise DeviceRefused(f"{path} has {size:,} bytes; name a device of at least {2 * STAMP:,}")
    return size


def stamp(path: str | Path) -> None:
    """Mark an empty device as ours. DeviceRefused unless its first and its last MiB are zeros or it is ours already."""
    size = check_device(path)
    fd = os.open(path, os.O_RDWR | os.O_EXCL)
    try:
        start, end = os.pread(fd, STAMP, 0), os.pread(fd, STAMP, size - STAMP)
        if start == _stamp(size):
            return
        if any(start) or any(end):
            raise DeviceRefused(
                f"{path} is not empty; if nothing on it is of use, clear its first and last MiB and try again"
            )
        os.pwrite(fd, _stamp(size), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _stamp(size: int) -> bytes:
    """A MiB without any zero run, so that whatever else writes there leaves a trace."""
    return b"hillinfer KV device 1\n" + hashlib.shake_256(struct.pack("<Q", size)).digest(STAMP - 22)


def check_stamped(path: str | Path) -> int:
    """`check_device`, and the device is ours."""
    size = check_device(path)
    with Path(path).open("rb") as device:
        if device.read(STAMP) != _stamp(size):
            raise DeviceRefused(f"{path} was not stamped by hillinfer; if it is empty: hillinfer stamp {path}")
    return size


class BlockDevice(BlockFile):
    """A stamped block device, opened for us alone."""

    def __init__(self, path: str | Path, threads: int = 16, **options):
        self.limit = check_stamped(path)
        self.what = f"the raw block device {path}"
        super().__init__(Path(path), threads, **options)
        self.size, self.trimmed = STAMP, False

    def _open(self, direct: bool) -> tuple[int, bool]:
        fd = os.open(self.folder, os.O_RDWR | os.O_EXCL | os.O_DIRECT)
        buffer = mmap.mmap(-1, STAMP)
        os.preadv(fd, [buffer], 0)  # once more, now that nobody else can change it
        if buffer[:] != _stamp(self.limit):
            os.close(fd)
            raise DeviceRefused(f"{self.folder} was changed while it was being opened; check what uses it")
        return fd, True

    def _extend(self, nbytes: int) -> int:
        nbytes = -(-nbytes // BLOCK) * BLOCK
        if self.size + nbytes > self.limit:
            raise DriveError(
                f"no room for {nbytes:,} bytes of KV on {self.folder}, which has {self.limit - self.size:,} left; "
                "shorten the context or name a larger device"
            )
        self.size += nbytes
        return self.size - nbytes

    def trim(self) -> None:
        """Tell the device that the data is of no more use. `trimmed` says whether it took the hint."""
        if self.sums:
            self.sums.forget()
        if self.fd is not None and self.size > STAMP:
            try:
                fcntl.ioctl(self.fd, DISCARD, struct.pack("<QQ", STAMP, self.size - STAMP))
                self.trimmed = True
            except OSError:
                pass  # not every device can; nothing is lost
            self.size = STAMP


def open_device(path: str | Path, threads: int = 16, **options) -> BlockDevice:
    """NVMe passthrough where the path is a character device of that kind, else O_DIRECT on a block device."""
    if re.fullmatch(r"ng\d+n\d+", Path(path).name):
        from hillinfer.systems.hardware.nvme import NvmeDevice

        return NvmeDevice(path, threads, **options)
    return BlockDevice(path, threads, **options)


def check_path(path: str | Path) -> None:
    """DeviceRefused where `open_device` would refuse, before anything is opened to be written."""
    if re.fullmatch(r"ng\d+n\d+", Path(path).name):
        from hillinfer.systems.hardware.nvme import check_namespace

        path = check_namespace(Path(path))[0]
    check_stamped(path)


def _size(fd: int) -> int:
    return struct.unpack("<Q", fcntl.ioctl(fd, GETSIZE64, bytes(ctypes.sizeof(ctypes.c_uint64))))[0]
