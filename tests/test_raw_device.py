"""A raw device: written to only if stamped, empty and unused; each reason to refuse it, on loop devices."""

import inspect
import os
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hillinfer
from hillinfer.commands.app import app
from hillinfer.errors import DriveError, UsageError
from hillinfer.growable import aligned
from hillinfer.native import ring
from hillinfer.systems.lossless.nvme import NvmeDevice, check_namespace, check_path, open_device
from hillinfer.systems.lossless.raw_device import STAMP, BlockDevice, check_device, check_stamped, stamp
from hillinfer.tiers.block_file import BLOCK, BlockFile

MIB = 1 << 20
SIZE = 320 * MIB


def run(*words, **kw):
    return subprocess.run(words, check=True, capture_output=True, text=True, **kw).stdout.strip()


@pytest.fixture
def loop(tmp_path):
    """A loop device of zeros, as large as XFS asks for; its file is sparse."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    try:
        name = run("losetup", "--find", "--show", str(image))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"loop devices need root: {error}")
    yield name
    subprocess.run(["losetup", "--detach", name], check=True)


@pytest.fixture
def ours(loop):
    stamp(loop)
    return loop


def untouched(path):
    with open(path, "rb") as file:  # noqa: PTH123  (device)
        return file.read(4 * MIB)


def test_an_empty_device_is_stamped_once_and_then_ours(loop):
    with pytest.raises(UsageError, match=f"hillinfer stamp {loop}"):
        check_stamped(loop)
    stamp(loop)
    stamp(loop)
    assert check_stamped(loop) == SIZE
    device = BlockDevice(loop)
    assert "raw block device" in device.about
    with pytest.raises(UsageError, match="cannot be opened exclusively"):  # a second run at once
        BlockDevice(loop)
    device.close()


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize(
    "make, words",
    [
        (("mkfs.ext4", "-q", "-F"), "ext2, ext3 or ext4"),
        (("mkfs.xfs", "-q", "-f"), "XFS"),
        (("mkfs.btrfs", "-q", "-f"), "Btrfs"),
        (("mkfs.vfat",), "FAT|partition"),
        (("mkswap", "-q"), "swap space"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_file_system_is_refused(loop, make, words, stamped, tmp_path):
    if stamped:
        stamp(loop)
    try:
        run(*make, loop)
    except FileNotFoundError:
        pytest.skip(f"no {make[0]} here")
    except subprocess.CalledProcessError as error:
        pytest.skip(error.stderr.strip()[-100:])
    before = untouched(loop)
    for attempt in (stamp, BlockDevice):
        with pytest.raises(UsageError, match=words):
            attempt(loop)
    assert untouched(loop) == before


@pytest.mark.parametrize("kind", ["GPT", "MBR"])
def test_a_partition_table_is_refused(loop, kind):
    sector = bytearray(512)
    sector[446:462] = bytes([0, 0, 2, 0, 0xEE if kind == "GPT" else 0x83, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0, 0xFF, 0, 0, 0])
    sector[510:] = b"\x55\xaa"
    with open(loop, "r+b") as file:  # noqa: PTH123
        file.write(sector + (b"EFI PART\0\0\1\0" if kind == "GPT" else b""))
    for attempt in (stamp, BlockDevice):
        with pytest.raises(UsageError, match="GPT partition table" if kind == "GPT" else "holds a partition table"):
            attempt(loop)


def test_a_mounted_device_is_refused(loop, tmp_path):
    run("mkfs.ext4", "-q", "-F", loop)
    (tmp_path / "mnt").mkdir()
    run("mount", loop, str(tmp_path / "mnt"))
    try:
        for attempt in (stamp, BlockDevice):
            with pytest.raises(UsageError, match=r"is mounted on .*mnt"):
                attempt(loop)
    finally:
        run("umount", str(tmp_path / "mnt"))


def test_a_device_in_use_is_refused(ours):
    fd = os.open(ours, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(UsageError, match="cannot be opened exclusively"):
        BlockDevice(ours)
    os.close(fd)


@pytest.mark.parametrize("what", ["held", "partitioned", "swap"])
def test_what_only_the_system_knows_is_refused(ours, tmp_path, what):
    """Holders, partitions and swap of a machine of our own making."""
    number = Path(ours).stat().st_rdev
    system = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    (system / "holders").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("")
    (tmp_path / "proc/swaps").write_text("Filename Type\n" + (f"{ours} partition\n" if what == "swap" else ""))
    if what == "held":
        (system / "holders/dm-0").mkdir()
    if what == "partitioned":
        (system / "loop0p1").mkdir()
        (system / "loop0p1/partition").write_text("1")
    with pytest.raises(UsageError, match={"held": "dm-0", "partitioned": "has partitions", "swap": "swap"}[what]):
        check_device(ours, tmp_path)


def test_data_without_a_known_signature_is_refused(loop):
    with open(loop, "r+b") as file:  # noqa: PTH123
        file.seek(700_000)
        file.write(b"somebody's data")
    with pytest.raises(UsageError, match="not empty"):
        stamp(loop)
    with pytest.raises(UsageError, match="was not stamped"):
        BlockDevice(loop)


def test_the_command_stamps_or_says_why_not(loop, tmp_path):
    assert CliRunner().invoke(app, ["stamp", loop]).exit_code == 0
    assert check_stamped(loop)
    refused = CliRunner().invoke(app, ["stamp", str(tmp_path)])
    assert refused.exit_code == 2 and "not a block device" in refused.output


@pytest.mark.parametrize("at", [0, 1024, 65536, STAMP - 1])
def test_a_stamp_that_lost_a_byte_is_none(ours, at):
    with open(ours, "r+b") as file:  # noqa: PTH123
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UsageError):
        BlockDevice(ours)


def test_what_is_no_block_device_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, words in ((tmp_path / "file", "not a block device"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UsageError, match=words):
            BlockDevice(path)
    for attempt in (open_device, check_path):
        with pytest.raises(UsageError, match="not a block device"):
            attempt("/dev/null")
        with pytest.raises(UsageError, match="not an NVMe character device"):
            attempt(tmp_path / "ng0n1")


def test_writes_stay_within_the_data_and_read_back(ours):
    device, rng = BlockDevice(ours), np.random.default_rng(0)
    first, second = device.allocate(3 * MIB), device.allocate(BLOCK)
    assert (first, second) == (STAMP, STAMP + 3 * MIB)
    data, back = aligned(3 * MIB), aligned(3 * MIB)
    data[:] = rng.integers(0, 256, len(data), dtype=np.uint8)
    device.transfer("write", [(first + i, data[i : i + MIB]) for i in range(0, 3 * MIB, MIB)], 0, 0)
    device.transfer("read", [(first, back)], 0, 0)
    assert (data == back).all()
    with pytest.raises(DriveError, match=r"no room for .* name a larger device"):
        device.allocate(SIZE)
    device.trim()
    assert device.trimmed
    device.sums = None  # else the read would say, and rightly, that the data is gone
    device.transfer("read", [(first, back)], 0, 0)
    assert not back.any()  # a loop device's TRIM reads as zeros
    device.close()
    assert check_stamped(ours) == SIZE  # the stamp outlives the run


@pytest.mark.parametrize("system", ["flexgen", "dualblade"])
def test_same_tokens_from_a_raw_device(models, prompt, tmp_path, ours, system, monkeypatch):
    monkeypatch.setattr("hillinfer.systems.lossless.tensors.HELD", BLOCK)
    model, words = models("llama"), dict(max_new_tokens=24, do_sample=False)
    want = model.generate(prompt, **words)
    with hillinfer.make_cache(model, system, drive=tmp_path, device=ours, host_budget=30_000) as cache:
        assert torch.equal(model.generate(prompt, past_key_values=cache, **words), want)
        assert "O_DIRECT on the raw block device" in cache.run.why_split()
    assert check_stamped(ours)


def null_takes_commands():
    """Skip before Linux 6.2 or so; the bytes of the commands and their results are tested everywhere (test_native)."""
    with open("/dev/null", "r+b") as null:  # noqa: PTH123
        one = np.array([0]), np.array([aligned(BLOCK).ctypes.data]), np.array([BLOCK])
        try:
            ring.Rings(2, ring.Namespace(1, 512)).transfer(False, null.fileno(), *one)
        except OSError as error:
            pytest.skip(f"no io_uring commands to /dev/null: {error}")


class StandIn(NvmeDevice):
    """The whole path except for the commands, which are plain reads and writes of the stamped block device."""

    def __init__(self, block):
        self.path, self.lba, self.max_bytes, self.sent = Path("/dev/null"), 4096, 128 << 10, []
        BlockDevice.__init__(self, block)
        self.engine.close()
        self.engine = StandInRings(self)
        self._check_stamp()


class StandInRings:
    name = "io_uring"

    def __init__(self, device):
        self.device, self.rings = device, ring.Rings(2)

    def transfer(self, write, fd, offsets, addresses, lengths, *rest):
        assert fd == self.device.fd != self.device.block_fd
        self.device.sent += lengths.tolist()
        self.rings.transfer(write, self.device.block_fd, offsets, addresses, lengths, *rest)

    def close(self):
        self.rings.close()


def test_nvme_transfers_are_cut_at_what_the_device_takes(ours):
    device = StandIn(ours)
    assert device.sent == [128 << 10] * 8  # the stamp, by commands
    at, data, back = device.allocate(MIB + BLOCK), aligned(MIB + BLOCK), aligned(MIB + BLOCK)
    data[:] = np.random.default_rng(2).integers(0, 256, len(data), dtype=np.uint8)
    device.sent.clear()
    device.transfer("write", [(at, data[:BLOCK]), (at + BLOCK, data[BLOCK:])], 0, 0)
    device.transfer("read", [(at, back)], 0, 0)
    assert (data == back).all()
    assert device.sent == [BLOCK] + [128 << 10] * 16 + [BLOCK]
    bad = at + 200 * BLOCK
    with open(ours, "r+b") as file:  # noqa: PTH123
        file.seek(bad + 99)
        file.write(b"!")
    with pytest.raises(DriveError, match=f"position 7: the block at offset {bad} is not what was written there"):
        device.transfer("read", [(at, back)], 0, 7)
    device.transfer("read", [(at, back)], 0, 0, verify=False)
    fds = device.fd, device.block_fd
    device.trim()
    assert device.trimmed
    device.close()
    device.close()
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)
    assert check_stamped(ours) == SIZE and not any(untouched(ours)[STAMP:])  # trimmed, but for the stamp


def test_an_nvme_device_of_another_namespace_is_refused(ours, tmp_path, monkeypatch):
    """Its stamp is not what commands read. /dev/null takes real io_uring commands, and they read nothing."""
    null_takes_commands()
    monkeypatch.setattr("hillinfer.systems.lossless.nvme.check_namespace", lambda path: (Path(ours), tmp_path))
    (tmp_path / "logical_block_size").write_text("512\n")
    (tmp_path / "max_hw_sectors_kb").write_text("128\n")
    (tmp_path / "max_segments").write_text("127\n")
    with pytest.raises(UsageError, match=r"/dev/null cannot be sent NVMe commands .* name /dev/loop"):
        NvmeDevice("/dev/null")
    monkeypatch.setattr("hillinfer.systems.lossless.nvme.fcntl.ioctl", lambda fd, number: 1)
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(UsageError, match="/dev/null is not the namespace of /dev/loop"):
        NvmeDevice("/dev/null")
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    BlockDevice(ours).close()  # nor does anything hold it


@pytest.mark.parametrize("name, value, words", [(None, "", "has no block device"), ("metadata_bytes", "8", "metadata"),
                                                ("integrity/format", "nop", "metadata")])  # fmt: skip
def test_unsafe_namespaces_are_refused(tmp_path, name, value, words):
    path = tmp_path / "ng0n1"
    if os.geteuid() != 0:
        pytest.skip("mknod needs root")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    if name:
        (tmp_path / "nvme0n1").write_bytes(b"")
        about = tmp_path / "sys/block/nvme0n1" / name
        about.parent.mkdir(parents=True)
        about.write_text(f"{value}\n")
    with pytest.raises(UsageError, match=words):
        check_namespace(path, tmp_path)


def subclasses(base):
    return [base] + [deeper for child in base.__subclasses__() for deeper in subclasses(child)]


def parameters(method):
    return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]


OWED = {("DirectDrive", "read")}  # returns its records, where `RecordFile.read` fills the caller's


def test_every_block_file_takes_what_its_base_takes():
    """A caller need not know which `BlockFile` it has: overridden public methods keep their signature."""
    compared = []
    for child in subclasses(BlockFile)[1:]:
        for name, method in vars(child).items():
            base = next((getattr(b, name) for b in child.__mro__[1:] if name in vars(b)), None)
            if not name.startswith("_") and inspect.isfunction(method) and base is not None:
                same = parameters(method) == parameters(base)
                assert same or (child.__name__, name) in OWED, (child, name)
                compared.append((child, name))
    assert {(BlockDevice, "trim"), (NvmeDevice, "close")} <= set(compared)
