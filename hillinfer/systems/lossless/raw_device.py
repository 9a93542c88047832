"""Block I/O on a raw block device, and the checks that protect other data from it.

A device is written to only if its first MiB, where every common file system, partition table and volume manager leaves
a signature, is exactly our stamp, and if it is not mounted, held or partitioned.
"""

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from hillinfer.errors import DriveError, UsageError
from hillinfer.growable import aligned
from hillinfer.tiers.block_file import BLOCK, BlockFile

STAMP = 1 << 20  # size of the stamp at the start of the device; data follows
DISCARD = 0x1277  # ioctl BLKDISCARD
SIGNATURES = [  # (contents, offset, bytes), for error messages only: a device without our stamp is refused in any case
    *(("a GPT partition table", block, b"EFI PART") for block in (512, 4096)),
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


def check_device(path: str | Path, root: Path = Path("/")) -> int:
    """Size in bytes of an unused block device without known contents. UsageError for any other path.

    root   parent of /proc and /sys
    """
    for reason in _objections(Path(path), root):
        raise UsageError(f"{path} {reason}")
    with Path(path).open("rb") as device:
        return device.seek(0, os.SEEK_END)


def _objections(path: Path, root: Path) -> Iterator[str]:
    """Reasons not to write to a device, each with its fix; later checks assume that the earlier ones passed."""
    if not path.exists():
        yield "does not exist; name a block device, or leave it out to use a file"
    if not path.is_block_device():
        yield "is not a block device; name one, or leave it out to use a file"
    number = path.stat().st_rdev
    name = f"{os.major(number)}:{os.minor(number)}"
    system = root / "sys/dev/block" / name
    if partitions := sorted(system.glob("*/partition")):
        yield f"has partitions ({partitions[0].parent.name}); name an empty device"
    if holders := sorted(entry.name for entry in (system / "holders").glob("*")):
        yield f"is held by {', '.join(holders)}; release it, or name another device"
    for words in map(str.split, (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()):
        if words[2] == name:
            yield f"is mounted on {words[4]}; unmount it, or name another device"
    swaps = [Path(line.split()[0]) for line in (root / "proc/swaps").read_text(encoding="utf-8").splitlines()[1:]]
    if any(swap.exists() and swap.stat().st_rdev == number for swap in swaps):
        yield "is swap space in use; name another device"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL)  # the kernel refuses O_EXCL while the device is in use
    except OSError as error:
        yield f"cannot be opened exclusively ({error.strerror}); is it in use, or not yours?"
    with os.fdopen(fd, "rb") as device:
        start, size = device.read(STAMP), device.seek(0, os.SEEK_END)
    for contents, offset, magic in SIGNATURES:
        if start[offset : offset + len(magic)] == magic:
            yield f"holds {contents}; name an empty device (wipefs -a {path} would destroy it)"
    if size < 2 * STAMP:
        yield f"has {size:,} bytes; name a device of at least {2 * STAMP:,}"


def stamp(path: str | Path) -> None:
    """Stamp an empty device. UsageError unless its first and last MiB are zeros or it has our stamp already."""
    size = check_device(path)
    fd = os.open(path, os.O_RDWR | os.O_EXCL)
    try:
        start, end = os.pread(fd, STAMP, 0), os.pread(fd, STAMP, size - STAMP)
        if start == stamp_of(size):
            return
        if any(start) or any(end):
            raise UsageError(
                f"{path} is not empty; if nothing on it matters, clear its first and last MiB and try again"
            )
        os.pwrite(fd, stamp_of(size), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def stamp_of(size: int) -> bytes:
    """The stamp of a device of this size: a MiB without runs of zeros, so that any other write to it shows."""
    return b"hillinfer KV device 1\n" + hashlib.shake_256(struct.pack("<Q", size)).digest(STAMP - 22)


def check_stamped(path: str | Path) -> int:
    """`check_device` of a device that must have our stamp."""
    size = check_device(path)
    with Path(path).open("rb") as device:
        if device.read(STAMP) != stamp_of(size):
            raise UsageError(f"{path} was not stamped by hillinfer; if it is empty: hillinfer stamp {path}")
    return size


class BlockDevice(BlockFile):
    """A stamped block device, opened exclusively."""

    def __init__(self, path: str | Path, **options):
        self.limit = check_stamped(path)
        self.what = f"the raw block device {path}"
        super().__init__(Path(path), **options)
        self.size, self.trimmed = STAMP, False

    def _open(self, direct: bool) -> tuple[int, bool]:
        self.block_fd = os.open(self.folder, os.O_RDWR | os.O_EXCL | os.O_DIRECT)
        start = aligned(STAMP)
        os.preadv(self.block_fd, [start], 0)  # again, now that it is opened exclusively
        if start.tobytes() != stamp_of(self.limit):
            os.close(self.block_fd)
            raise UsageError(f"{self.folder} was changed while it was being opened; check what uses it")
        return self.block_fd, True

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
        """Discard the data (TRIM, NVMe Deallocate). `trimmed` is True if the device supports it."""
        if self.sums:
            self.sums.forget()
        if self.fd is not None and self.size > STAMP:
            try:
                fcntl.ioctl(self.block_fd, DISCARD, struct.pack("<QQ", STAMP, self.size - STAMP))
                self.trimmed = True
            except OSError:
                pass  # optional
            self.size = STAMP
