"""Raw devices for the direct path, by path: NVMe passthrough or a block device."""

import re
from pathlib import Path

from hillinfer.systems.lossless.nvme import NvmeDevice, check_namespace
from hillinfer.systems.lossless.raw_device import BlockDevice, check_stamped


def open_device(path: str | Path, threads: int = 16, **options) -> BlockDevice:
    """Open an NVMe character device (/dev/ngXnY) by passthrough, any other path as a block device with O_DIRECT."""
    return (NvmeDevice if _is_nvme(path) else BlockDevice)(path, threads, **options)


def check_path(path: str | Path) -> None:
    """Raise the UsageError that `open_device` would raise, without opening anything for writing."""
    check_stamped(check_namespace(path)[0] if _is_nvme(path) else path)


def _is_nvme(path: str | Path) -> bool:
    return bool(re.fullmatch(r"ng\d+n\d+", Path(path).name))
