"""NVMe passthrough: READ and WRITE commands straight to a namespace's character device, below VFS and block layer.

The commands of the NVMe base specification, in the ring entries of <linux/nvme_ioctl.h> (struct nvme_uring_cmd).
"""

import errno
import fcntl
import os
import re
import stat
import struct
import threading
from pathlib import Path

import numpy as np

from hillinfer.systems.hardware.raw_device import STAMP, BlockDevice, DeviceRefused, _stamp
from hillinfer.systems.hardware.uring import Ring
from hillinfer.tiers.block_file import BLOCK, aligned
from hillinfer.tiers.checksums import memory_at

URING_CMD = 46  # io_uring opcode
CMD_IO = 0xC0484E80  # NVME_URING_CMD_IO: _IOWR('N', 0x80, struct nvme_uring_cmd)
NVME_ID = 0x4E40  # ioctl: the namespace's number
WRITE, READ, MANAGE = 0x01, 0x02, 0x09  # NVMe opcodes; the last is Dataset Management
DEALLOCATE = 1 << 2
DEPTH = 32  # commands in flight
COMMAND = np.dtype(  # struct nvme_uring_cmd, 72 bytes, at byte 48 of a wide submission entry
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("rsvd1", "<u2"),
        ("nsid", "<u4"),
        ("cdw2", "<u4", 2),
        ("metadata", "<u8"),
        ("addr", "<u8"),
        ("metadata_len", "<u4"),
        ("data_len", "<u4"),
        ("cdw10", "<u4", 6),
        ("timeout_ms", "<u4"),
        ("rsvd2", "<u4"),
    ]
)


class Command:
    """One NVMe command as a job of a ring; all or nothing, there are no short transfers."""

    def __init__(self, opcode: int, offset: int, buffer: np.ndarray, lba: int):
        self.opcode, self.offset = opcode, offset
        self.buffer, self.address = buffer, buffer.ctypes.data  # held while it is written to
        self.words = [offset // lba & 0xFFFFFFFF, offset // lba >> 32, len(buffer) // lba - 1]

    def done(self, result: int) -> bool:
        if result in (-errno.EAGAIN, -errno.EINTR):
            return True
        if result:  # negative: the kernel's; positive: an NVMe status
            text = os.strerror(-result) if result < 0 else f"NVMe status {result:#x}"
            raise OSError(abs(result) if result < 0 else errno.EIO, text)
        return False


class NvmeDevice(BlockDevice):
    """A namespace by its character device /dev/ngXnY. Stamp and guard are those of its block device /dev/nvmeXnY."""

    def __init__(self, path: str | Path, threads: int = 16, **options):
        self.path = Path(path)
        block, queue = check_namespace(self.path)
        self.lba = int((queue / "logical_block_size").read_text())
        self.most = int((queue / "max_hw_sectors_kb").read_text()) * 1024  # MDTS
        self.command_fd = os.open(self.path, os.O_RDWR)
        try:
            self.nsid = fcntl.ioctl(self.command_fd, NVME_ID)
            super().__init__(block, threads, **options | {"engine": "threads"})
            try:
                self._start()
            except BaseException:
                super().close()
                raise
        except BaseException:
            os.close(self.command_fd)
            raise

    @property
    def about(self) -> str:
        return f"NVMe passthrough (io_uring_cmd) to {self.path}"

    def _start(self) -> None:
        """Read the stamp by a command: the character device must be the namespace whose block device was checked."""
        self._free, self._lend = [], threading.Lock()  # rings that nobody uses; threads take one each
        try:
            self._free.append(self._ring())
        except OSError:
            raise DeviceRefused(
                f"{self.path} needs io_uring with wide entries (Linux 5.19): name {self.folder} instead"
            ) from None
        start = aligned(STAMP)
        self.transfer("read", [(0, start)], 0, 0)
        if start.tobytes() != _stamp(self.limit):
            raise DeviceRefused(f"{self.path} is not the namespace of {self.folder}; name the block device instead")

    def transfer(self, verb, jobs, stream, position, share=1) -> None:
        cut = min(self.most, 65536 * self.lba)
        pieces = [(offset + at, buffer[at : at + cut]) for offset, buffer in jobs for at in range(0, len(buffer), cut)]
        super().transfer(verb, pieces, stream, position, share)

    def _move(self, verb: str, offsets, addresses, lengths, keep, share: float = 1, sums=None) -> None:
        opcode, pieces = READ if verb == "read" else WRITE, np.stack((offsets, addresses, lengths), 1).tolist()
        commands = [Command(opcode, at, np.asarray(memory_at(*where)), self.lba) for at, *where in pieces]
        self._run(commands, share, keep)

    def _run(self, commands: list[Command], share: float = 1, keep: object = None) -> None:
        with self._lend:
            ring = self._free.pop() if self._free else None
        ring = ring or self._ring()
        try:
            ring.keep = keep
            ring.run(commands, self.encode, int(ring.depth * share))
        finally:
            self.stuck = self.stuck or ring.stuck
            with self._lend:
                self._free.append(ring)

    def _ring(self) -> Ring:
        return Ring(DEPTH, self.timeout)

    def encode(self, ring: Ring, slot: int, job: Command) -> None:
        ring.fill(slot, URING_CMD, self.command_fd, CMD_IO, 0, 0)
        ring.entries[slot, 48:120].view(COMMAND)[0] = command(job, self.nsid)

    def trim(self) -> None:
        """Deallocate what was written (Dataset Management), a range of up to 2^32 - 1 blocks at a time."""
        if self.sums:
            self.sums.forget()
        start, count = STAMP // self.lba, (self.size - STAMP) // self.lba
        if self.fd is None or not count:
            return
        ranges = aligned(BLOCK)
        jobs = []
        for at in range(0, count, 0xFFFFFFFF):
            ranges[16 * len(jobs) : 16 * len(jobs) + 16] = np.frombuffer(
                struct.pack("<IIQ", 0, min(count - at, 0xFFFFFFFF), start + at), np.uint8
            )
            jobs.append(at)
        job = Command(MANAGE, 0, ranges, self.lba)
        job.words = [len(jobs) - 1, DEALLOCATE, 0]
        try:
            self._run([job])
            self.trimmed = True
        except OSError:
            pass  # a hint only
        self.size = STAMP

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.command_fd)
            for ring in self._free:
                ring.close()
        super().close()


def command(job: Command, nsid: int) -> tuple:
    """The fields of COMMAND for a job."""
    words = [*job.words, 0, 0, 0]
    return (job.opcode, 0, 0, nsid, [0, 0], 0, job.address, 0, len(job.buffer), words, 0, 0)


def check_namespace(path: Path, root: Path = Path("/")) -> tuple[Path, Path]:
    """The block device of /dev/ngXnY and its queue's folder in /sys; DeviceRefused where commands are not safe."""
    if not path.exists() or not stat.S_ISCHR(path.stat().st_mode):
        raise DeviceRefused(f"{path} is no NVMe character device; name /dev/ngXnY, a block device, or nothing")
    name = re.sub(r"^ng", "nvme", path.name)
    block, system = path.with_name(name), root / "sys/block" / name
    if not system.exists() or not block.exists():
        raise DeviceRefused(f"{path} has no block device {block} to check; name a block device, or nothing")
    metadata = system / "metadata_bytes"
    if metadata.exists() and int(metadata.read_text()):
        raise DeviceRefused(f"{path} is formatted with metadata for each block; use the block device {block}")
    return block, system / "queue"
