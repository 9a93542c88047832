"""A raw device: written to only if stamped, empty and unused; each reason to refuse it, on loop devices."""

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
from hillinfer.errors import DriveError
from hillinfer.systems.hardware import nvme
from hillinfer.systems.hardware.nvme import CMD_IO, COMMAND, Command, check_namespace, command
from hillinfer.systems.hardware.raw_device import (
    STAMP,
    BlockDevice,
    DeviceRefused,
    check_device,
    check_stamped,
    open_device,
    stamp,
)
from hillinfer.systems.hardware.uring import SQE, Ring
from hillinfer.tiers.block_file import BLOCK, aligned

MIB = 1 << 20
READ, WRITE = 22, 23  # opcodes of io_uring
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
    with pytest.raises(DeviceRefused, match=f"hillinfer stamp {loop}"):
        check_stamped(loop)
    stamp(loop)
    stamp(loop)
    assert check_stamped(loop) == SIZE
    device = BlockDevice(loop)
    assert "raw block device" in device.about
    with pytest.raises(DeviceRefused, match="cannot be had alone"):  # a second run at once
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
        with pytest.raises(DeviceRefused, match=words):
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
        with pytest.raises(DeviceRefused, match="GPT partition table" if kind == "GPT" else "holds a partition table"):
            attempt(loop)


def test_a_mounted_device_is_refused(loop, tmp_path):
    run("mkfs.ext4", "-q", "-F", loop)
    (tmp_path / "mnt").mkdir()
    run("mount", loop, str(tmp_path / "mnt"))
    try:
        for attempt in (stamp, BlockDevice):
            with pytest.raises(DeviceRefused, match=r"is mounted on .*mnt"):
                attempt(loop)
    finally:
        run("umount", str(tmp_path / "mnt"))


def test_a_device_in_use_is_refused(ours):
    fd = os.open(ours, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(DeviceRefused, match="cannot be had alone"):
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
    with pytest.raises(DeviceRefused, match={"held": "dm-0", "partitioned": "has partitions", "swap": "swap"}[what]):
        check_device(ours, tmp_path)


def test_data_without_a_known_signature_is_refused(loop):
    with open(loop, "r+b") as file:  # noqa: PTH123
        file.seek(700_000)
        file.write(b"somebody's data")
    with pytest.raises(DeviceRefused, match="not empty"):
        stamp(loop)
    with pytest.raises(DeviceRefused, match="was not stamped"):
        BlockDevice(loop)


def test_the_command_stamps_or_says_why_not(loop, tmp_path):
    assert CliRunner().invoke(app, ["stamp", loop]).exit_code == 0
    assert check_stamped(loop)
    refused = CliRunner().invoke(app, ["stamp", str(tmp_path)])
    assert refused.exit_code == 2 and "no block device" in refused.output


@pytest.mark.parametrize("at", [0, 1024, 65536, STAMP - 1])
def test_a_stamp_that_lost_a_byte_is_none(ours, at):
    with open(ours, "r+b") as file:  # noqa: PTH123
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DeviceRefused):
        BlockDevice(ours)


def test_what_is_no_block_device_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, words in ((tmp_path / "file", "no block device"), (tmp_path / "none", "does not exist")):
        with pytest.raises(DeviceRefused, match=words):
            BlockDevice(path)
    with pytest.raises(DeviceRefused, match="no block device"):
        open_device("/dev/null")
    with pytest.raises(DeviceRefused, match="no NVMe character device"):
        open_device(tmp_path / "ng0n1")


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
    hillinfer.disable(model)
    assert check_stamped(ours)


def test_a_ring_reads_what_it_wrote(tmp_path):
    """More jobs than fit in flight."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    data, back = aligned(100 * BLOCK), aligned(100 * BLOCK)
    data[:] = np.random.default_rng(1).integers(0, 256, len(data), dtype=np.uint8)
    ring = Ring(8)
    spans = [slice(i * BLOCK, (i + 1) * BLOCK) for i in range(100)]
    for _ in range(3):  # the queues wrap round
        ring.run([Transfer(WRITE, fd, s.start, data[s]) for s in spans], plain)
        ring.run([Transfer(READ, fd, s.start, back[s]) for s in spans], plain)
    assert (data == back).all()
    with pytest.raises(OSError, match="bytes are missing"):
        ring.run([Transfer(READ, fd, 99 * BLOCK, aligned(2 * BLOCK))], plain)
    with pytest.raises(OSError, match="Bad file"):
        ring.run([Transfer(READ, 9999, 0, back[:BLOCK])], plain)
    ring.run([Transfer(READ, fd, 0, back[:BLOCK])], plain)  # still usable
    ring.close()
    os.close(fd)


class Transfer:
    """A plain read or write as a job of a ring."""

    def __init__(self, opcode, fd, offset, buffer):
        self.entry, self.buffer = (opcode, fd, offset, buffer.ctypes.data, len(buffer)), buffer

    def done(self, result):
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        if result < len(self.buffer):
            raise OSError("bytes are missing")
        return False


def plain(ring, slot, job):
    ring.fill(slot, *job.entry)


def test_nvme_commands_are_laid_out_as_the_kernel_expects():
    """The bytes of one READ and one WRITE, field by field against struct nvme_uring_cmd and the NVMe command set."""
    assert COMMAND.itemsize == 72 and (CMD_IO >> 16 & 0x3FFF, CMD_IO >> 8 & 0xFF, CMD_IO & 0xFF) == (72, 0x4E, 0x80)
    for opcode in (nvme.READ, nvme.WRITE):
        device, buffer = nvme.NvmeDevice.__new__(nvme.NvmeDevice), aligned(8 * BLOCK)
        device.lba, device.nsid, device.command_fd = 512, 3, 77
        job = Command(opcode, (5 << 32) * 512 + 7 * 512, buffer, device.lba)
        ring = Ring.__new__(Ring)
        ring.entries = np.zeros((4, 128), np.uint8)
        ring._sqes = ring.entries[:, :64].view(SQE)[:, 0]
        device.encode(ring, 2, job)
        raw = ring.entries[2].tobytes()
        assert raw[0] == 46 and int.from_bytes(raw[4:8], "little") == 77
        assert int.from_bytes(raw[8:12], "little") == CMD_IO
        sent = raw[48:120]
        assert sent[0] == opcode and int.from_bytes(sent[4:8], "little") == 3
        assert int.from_bytes(sent[24:32], "little") == buffer.ctypes.data
        assert int.from_bytes(sent[36:40], "little") == 8 * BLOCK
        assert [int.from_bytes(sent[40 + 4 * i :][:4], "little") for i in range(3)] == [7, 5, 8 * BLOCK // 512 - 1]
        assert command(job, 3)[0] == opcode


def test_nvme_results_are_errors_or_done():
    job = Command(nvme.READ, 0, aligned(BLOCK), 512)
    assert job.done(0) is False and job.done(-11) is True
    with pytest.raises(OSError, match="Permission"):
        job.done(-13)
    with pytest.raises(OSError, match="NVMe status 0x80"):
        job.done(0x80)


def test_nvme_transfers_are_cut_at_what_the_device_takes(ours, monkeypatch):
    """The whole path but for the command itself, which here is a plain read or write of the stamped loop device."""

    class Stand(nvme.NvmeDevice):
        def __init__(self):
            self.path, self.lba, self.most, self.nsid = Path("/dev/ng9n1"), 4096, 128 << 10, 1
            self.command_fd, self.sent = os.open(ours, os.O_RDWR | os.O_DIRECT), []
            BlockDevice.__init__(self, ours)
            self._start()

        def encode(self, ring, slot, job):
            self.sent.append((job.words, len(job.buffer)))
            opcode = {nvme.READ: READ, nvme.WRITE: WRITE}[job.opcode]
            ring.fill(slot, opcode, self.command_fd, job.offset, job.address, len(job.buffer))

    monkeypatch.setattr(Command, "done", lambda self, result: result != len(self.buffer))
    device = Stand()
    at, data, back = device.allocate(MIB), aligned(MIB), aligned(MIB)
    data[:] = np.random.default_rng(2).integers(0, 256, MIB, dtype=np.uint8)
    device.transfer("write", [(at, data)], 0, 0)
    device.transfer("read", [(at, back)], 0, 0)
    assert (data == back).all()
    assert max(size for _, size in device.sent) == 128 << 10
    assert device.sent[-1][0][2] == (128 << 10) // 4096 - 1
    device.close()


@pytest.mark.parametrize("metadata, words", [(None, "no block device"), ("8", "metadata")])
def test_unsafe_namespaces_are_refused(tmp_path, metadata, words, monkeypatch):
    path = tmp_path / "ng0n1"
    if os.geteuid() != 0:
        pytest.skip("mknod needs root")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    if metadata:
        (tmp_path / "nvme0n1").write_bytes(b"")
        (tmp_path / "sys/block/nvme0n1").mkdir(parents=True)
        (tmp_path / "sys/block/nvme0n1/metadata_bytes").write_text(metadata)
    with pytest.raises(DeviceRefused, match=words):
        check_namespace(path, tmp_path)
