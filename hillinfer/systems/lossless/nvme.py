"""NVMe passthrough: READ and WRITE commands to a namespace's character device, below VFS and block layer.

`native.ring` sends the commands of the NVMe base specification (struct nvme_uring_cmd of <linux/nvme_ioctl.h>).
"""

import fcntl
import os
import re
from pathlib import Path

from hillinfer.errors import UsageError
from hillinfer.growable import aligned
from hillinfer.native.ring import LBAS, Namespace, Rings
from hillinfer.systems.lossless.raw_device import STAMP, BlockDevice, check_stamped, stamp_of
from hillinfer.tiers.block_file import BLOCK, cuts

NVME_ID = 0x4E40  # ioctl NVME_IOCTL_ID: the namespace's id
DEPTH = 32  # commands in flight


class NvmeDevice(BlockDevice):
    """A namespace by its character device /dev/ngXnY.

    Its block device /dev/nvmeXnY has the stamp, is opened exclusively and receives the TRIM.
    """

    def __init__(self, path: str | Path, **options):
        self.path = Path(path)
        block, queue = check_namespace(self.path)
        names = "logical_block_size", "max_hw_sectors_kb", "max_segments"
        self.lba, most, segments = (int((queue / name).read_text(encoding="utf-8")) for name in names)
        self.max_bytes = min(most * 1024, segments * BLOCK)  # of one command: MDTS, and pages scattered in memory
        super().__init__(block, **options | {"engine": "threads"})
        try:
            self.engine.close()
            self.engine = self._open_rings()
            self._check_stamp()
        except BaseException:
            self.close()
            raise

    @property
    def about(self) -> str:
        return f"NVMe passthrough (io_uring_cmd) to {self.path}"

    def _open(self, direct: bool) -> tuple[int, bool]:
        """Open the block device exclusively, but transfer through the character device."""
        super()._open(direct)
        try:
            return os.open(self.path, os.O_RDWR), True
        except BaseException:
            os.close(self.block_fd)
            raise

    def _open_rings(self) -> Rings:
        try:
            return Rings(DEPTH, Namespace(fcntl.ioctl(self.fd, NVME_ID), self.lba))
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be sent NVMe commands ({error.strerror or error}); they need Linux 5.19: "
                f"name {self.folder} instead"
            ) from None

    def _check_stamp(self) -> None:
        """Read the stamp by NVMe commands: the character device must belong to the checked block device."""
        start = aligned(STAMP)
        self.transfer("read", [(0, start)], 0, 0)
        if start.tobytes() != stamp_of(self.limit):
            raise UsageError(f"{self.path} is not the namespace of {self.folder}; name the block device instead")

    def move(
        self, verb: str, offsets, addresses, lengths, keep, stream: int, position, share: float = 1, verify=True
    ) -> None:
        """Split pieces at the maximum command size, so that all commands are in flight at once."""
        of, at, own = cuts(lengths, min(self.max_bytes, LBAS * self.lba) // BLOCK * BLOCK)
        super().move(verb, offsets[of] + at, addresses[of] + at, own, keep, stream, position, share, verify)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.block_fd)
        super().close()


def check_namespace(path: str | Path, root: Path = Path("/")) -> tuple[Path, Path]:
    """The block device of /dev/ngXnY and its queue folder in /sys. UsageError if passthrough would be unsafe."""
    path = Path(path)
    if not path.is_char_device():
        raise UsageError(f"{path} is not an NVMe character device; name /dev/ngXnY, a block device, or nothing")
    block = path.with_name(re.sub(r"^ng", "nvme", path.name))
    system = root / "sys/block" / block.name
    if not system.exists() or not block.exists():
        raise UsageError(f"{path} has no block device {block} to check; name a block device, or nothing")
    for name, plain in (("metadata_bytes", "0"), ("integrity/format", "none")):  # newer kernels; all
        if (system / name).exists() and (system / name).read_text(encoding="utf-8").strip() != plain:
            raise UsageError(f"{path} is formatted with metadata in each block; use the block device {block}")
    return block, system / "queue"


def open_device(path: str | Path, **options) -> BlockDevice:
    """Open a raw device: /dev/ngXnY by NVMe passthrough, any other path as a block device with O_DIRECT."""
    return (NvmeDevice if _is_nvme(path) else BlockDevice)(path, **options)


def check_path(path: str | Path) -> None:
    """Raise the UsageError that `open_device` would raise, without opening the device for writing."""
    check_stamped(check_namespace(path)[0] if _is_nvme(path) else path)


def _is_nvme(path: str | Path) -> bool:
    return bool(re.fullmatch(r"ng\d+n\d+", Path(path).name))
