"""What runs in the guest: each check prints a line of JSON. python -m benchmarks.nvme.guest first|second"""

import ctypes
import fcntl
import json
import os
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.nvme import MIB, UNREADABLE, UNWRITABLE
from hillinfer.errors import DriveError, UsageError
from hillinfer.growable import aligned
from hillinfer.native.ring import Namespace, Rings
from hillinfer.systems.lossless.nvme import NVME_ID, NvmeDevice, check_path, open_device
from hillinfer.systems.lossless.raw_device import STAMP, check_stamped, stamp, stamp_of
from hillinfer.systems.registry import make_cache

KV_END, LAST = 16 * MIB, 1 * MIB  # our runs stay below; the device's last MiB is zeros, as `stamp` demands
ADMIN, ATTACHMENT = 0xC0484E41, 0x15  # ioctl NVME_IOCTL_ADMIN_CMD; Namespace Attachment
MODULES, BUSYBOX = Path("/run/nvme"), "/run/nvme/busybox"
FILES = Path("/mnt/files")


def check(name: str, bar: str, measured: Callable[..., tuple[bool, str]], *arguments) -> None:
    try:
        ok, figure = measured(*arguments)
    except Exception as error:
        traceback.print_exc()
        ok, figure = False, f"{type(error).__name__}: {error}"
    print("\ncheck " + json.dumps({"name": name, "bar": bar, "ok": bool(ok), "figure": figure}), flush=True)


def refusal(words: str, kind: type[Exception], action: Callable, *arguments) -> tuple[bool, str]:
    """Whether `action` raises one line of this kind with these words in it."""
    try:
        action(*arguments)
    except kind as error:
        return words in str(error) and "\n" not in str(error), str(error)
    return False, "nothing was raised"


def controller(serial: str) -> str:
    """Its name, such as nvme0."""
    found = Path("/sys/class/nvme").glob("*/serial")
    return next(path.parent.name for path in found if path.read_text(encoding="utf-8").strip() == serial)


def block(serial: str, number: int) -> Path:
    return Path(f"/dev/{controller(serial)}n{number}")


def passthrough(serial: str, number: int) -> Path:
    return Path(f"/dev/{controller(serial).replace('nvme', 'ng')}n{number}")


def pattern(size: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(size).bytes(size - LAST - KV_END), np.uint8)


def fill(path: Path) -> None:
    """Write the pattern, so that a write beyond the KV of our runs would show."""
    with path.open("r+b", buffering=0) as device:
        size = device.seek(0, os.SEEK_END)
        device.seek(KV_END)
        device.write(pattern(size))
        os.fsync(device.fileno())


def untouched(path: Path) -> bool:
    """Whether stamp, pattern and end are what they were."""
    subprocess.run([BUSYBOX, "blockdev", "--flushbufs", path], check=True)
    with path.open("rb") as device:
        whole = np.frombuffer(device.read(), np.uint8)
    size = len(whole)
    stamped = whole[:STAMP].tobytes() == stamp_of(size)
    return stamped and np.array_equal(whole[KV_END : size - LAST], pattern(size)) and not whole[size - LAST :].any()


def wipe(path: Path) -> None:
    with path.open("r+b", buffering=0) as device:
        size = device.seek(0, os.SEEK_END)
        for at in (0, size - MIB):
            device.seek(at)
            device.write(bytes(MIB))
        os.fsync(device.fileno())


class Model:
    """A small Llama with random weights, a prompt, and greedy answers over systems and devices.

    It has more layers than there are transfer slots, so that each step reads from the device.
    """

    def __init__(self):
        torch.manual_seed(7)
        size = dict(
            hidden_size=64, intermediate_size=64, num_hidden_layers=4, vocab_size=97, max_position_embeddings=1024
        )
        self.model = LlamaForCausalLM(
            LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=4, head_dim=64)
        ).eval()
        for weight in self.model.parameters():
            torch.nn.init.normal_(weight, std=0.15) if weight.dim() > 1 else None
        self.ids = torch.randint(2, 97, (1, 300))

    def answer(self, system: str, device: Path | None, tokens: int = 16, each: Callable | None = None):
        """Token ids with all logits, and how the direct path was reached."""
        with make_cache(self.model, system, drive=FILES, device=device, host_budget=0) as cache:
            asked = dict(
                past_key_values=cache, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            if each is not None:
                asked["stopping_criteria"] = [lambda ids, scores: bool(each(ids.shape[1] - 300))]
            out = self.model.generate(self.ids, **asked, output_logits=True, return_dict_in_generate=True)
            return out.sequences, torch.stack(out.logits), cache.run.why_split()

    def equal(self, system: str, device: Path, words: str, wanted: tuple) -> tuple[bool, str]:
        sequences, logits, why = self.answer(system, device)
        same = torch.equal(sequences, wanted[0]) and torch.equal(logits, wanted[1])
        return same and words in why, f"{'equal' if same else 'differs'}: {why}"


def reload(**options) -> None:
    """Load the NVMe driver again, with other options."""
    subprocess.run([BUSYBOX, "rmmod", "nvme"], check=True)
    time.sleep(1)
    module = next(MODULES.glob("*nvme.ko"))
    subprocess.run([BUSYBOX, "insmod", module, *(f"{name}={value}" for name, value in options.items())], check=True)
    for _ in range(100):
        time.sleep(0.2)
        if len(list(Path("/dev").glob("ng*n*"))) == 7:
            return


def attachment(serial: str, number: int, attach: bool) -> None:
    """Attach a namespace to its controller, or detach it: an admin command of the NVMe specification."""
    name = controller(serial)
    own = int((Path("/sys/class/nvme") / name / "cntlid").read_text(encoding="utf-8"))
    listed = ctypes.create_string_buffer(struct.pack("<HH", 1, own), 4096)
    command = struct.pack("<BBHIIIQQII6III", ATTACHMENT, 0, 0, number, 0, 0, 0, ctypes.addressof(listed), 0, 4096,
                          0 if attach else 1, 0, 0, 0, 0, 0, 0, 0)  # fmt: skip
    with Path(f"/dev/{name}").open("rb") as device:
        if status := fcntl.ioctl(device, ADMIN, bytearray(command)):
            raise OSError(f"Namespace Attachment: NVMe status {status:#x}")
    (Path("/sys/class/nvme") / name / "rescan_controller").write_text("1", encoding="utf-8")


def refusals() -> None:
    """What must not be written to; leaves the namespaces empty, apart from the one with our files."""
    ext4, empty, large = block("large", 1), block("small", 2), block("large", 3)

    def refused(name: str, words: str, action: Callable, path: Path) -> None:
        check(f"{name}, {path}", "refused", refusal, words, UsageError, action, path)

    refused("no stamp", f"hillinfer stamp {empty}", check_stamped, empty)
    subprocess.run(["mkfs.ext4", "-q", ext4], check=True)
    refused("a file system", "holds an ext2, ext3 or ext4 file system", stamp, ext4)
    mount_files()
    refused("a mounted namespace", f"is mounted on {FILES}", stamp, ext4)
    for path in (empty, large):
        subprocess.run(["sfdisk", "-q", path], input="label: gpt\nstart=1MiB, size=4MiB\n", text=True, check=True)
        refused("a partition", "has partitions", stamp, path)
        subprocess.run(["sfdisk", "-q", "--delete", path], check=True)
        refused("a partition table", "holds a GPT", stamp, path)
        wipe(path)
    held = os.open(empty, os.O_RDWR | os.O_EXCL)
    refused("a namespace in use", "cannot be opened exclusively", stamp, empty)
    os.close(held)
    stamp(block("small", 3))
    refused("blocks with metadata", "formatted with metadata", check_path, passthrough("small", 3))


def mount_files() -> None:
    FILES.mkdir(parents=True, exist_ok=True)
    subprocess.run([BUSYBOX, "mount", "-t", "ext4", block("large", 1), FILES], check=True)


def limits() -> tuple[bool, str]:
    """4 MiB over a controller that takes 32 KiB at once, and one command that is too large."""
    device, data = NvmeDevice(passthrough("small", 1)), aligned(4 * MIB)
    data[:] = np.random.default_rng(5).integers(0, 256, len(data), dtype=np.uint8)
    try:
        at, back = device.allocate(len(data)), aligned(len(data))
        device.transfer("write", [(at, data)], 0, 0)
        device.transfer("read", [(at, back)], 0, 0)
        one = Rings(1, Namespace(fcntl.ioctl(device.fd, NVME_ID), device.lba))
        piece = (np.array([number], np.int64) for number in (at, data.ctypes.data, 2 * device.max_bytes))
        refused, why = refusal("", OSError, one.transfer, True, device.fd, *piece)
        equal = device.max_bytes == 32 << 10 and np.array_equal(data, back)
        return equal and refused, f"{device.max_bytes:,} bytes; twice that: {why}"
    finally:
        device.trim()
        device.close()


def faults(path: Path) -> None:
    """Errors of single blocks."""
    device, data = open_device(path), aligned(64 << 10)
    for verb, at in (("read", UNREADABLE), ("write", UNWRITABLE)):
        piece = [(at // len(data) * len(data), data)]
        act = (device.transfer, verb, piece, 1, 3)
        check(f"an I/O error in a {verb}, {path}", "one line", refusal, f"{verb} failed at layer 1", DriveError, *act)
    beside = lambda: (device.transfer("read", [(8 * MIB, data)], 0, 0) is None, "read")  # noqa: E731
    check(f"blocks beside it, {path}", "read", beside)
    device.close()


def detached(model: Model, path: Path, wanted: tuple) -> None:
    def gone(step: int) -> bool:
        if step == 5:
            attachment("multi", 1, False)
        return False

    name, start = f"a namespace detached in mid-run, {path}", time.monotonic()
    check(name, "one line", refusal, "failed at layer", DriveError, model.answer, "dualblade", path, 16, gone)
    took = time.monotonic() - start
    check(f"{name}: no hang", "60 s", lambda: (took < 60, f"{took:.0f} s"))
    attachment("multi", 1, True)
    for _ in range(100):
        time.sleep(0.2)
        if path.exists() and block("multi", 1).exists():
            break
    words = "passthrough" if path.name.startswith("ng") else "raw block device"
    check(f"attached again, {path}", "equal", model.equal, "dualblade", path, words, wanted)


def scattered(nbytes: int) -> np.ndarray:
    """A buffer whose pages were first touched out of order, so that they are not neighbours in physical memory."""
    data = aligned(nbytes)
    for page in np.random.default_rng(1).permutation(nbytes // 4096):
        data[page * 4096] = 0
    return data


def many_threads() -> tuple[bool, str]:
    """Seven threads with all their commands at once, over memory that is nowhere contiguous."""
    device, wrong = NvmeDevice(passthrough("large", 3)), []

    def work(number: int) -> None:
        data, back = scattered(2 * MIB), scattered(2 * MIB)
        data[:] = np.random.default_rng(number).integers(0, 256, len(data), dtype=np.uint8)
        try:
            device.transfer("write", [(places[number], data)], 0, 0)
            device.transfer("read", [(places[number], back)], 0, 0)
            if not np.array_equal(data, back):
                wrong.append(f"thread {number}: not equal")
        except DriveError as error:
            wrong.append(str(error))

    places = [device.allocate(2 * MIB) for _ in range(7)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.trim()
    device.close()
    return not wrong, "; ".join(wrong) or f"{len(threads)} threads equal, {device.max_bytes >> 10} KiB a command"


def both(number: int) -> dict[str, Path]:
    return {"raw block device": block("small", number), "passthrough": passthrough("small", number)}


def unchanged(path: Path) -> tuple[bool, str]:
    return untouched(path), "compared byte by byte"


def trimmed(path: Path) -> tuple[bool, str]:
    with path.open("rb") as device:
        device.seek(STAMP)
        left = np.count_nonzero(np.frombuffer(device.read(KV_END - STAMP), np.uint8))
    return left == 0, f"{left:,} bytes that are not zero"


def first() -> None:
    refusals()
    for serial, number in (("small", 1), ("small", 2), ("large", 2), ("large", 3), ("multi", 1)):
        path = block(serial, number)
        if path != block("large", 2):  # whose bad blocks are within the pattern
            fill(path)
        stamp(path)
        stamp(path)
        check(f"a stamp on {path}", "ours", lambda own=path: (check_stamped(own) > 0, f"{check_stamped(own):,} bytes"))
    model, wanted = Model(), {}
    for system in ("dualblade", "flexgen"):
        wanted[system] = model.answer(system, None)
        for number, size in ((1, 512), (2, 4096)):
            for words, path in both(number).items():
                name = f"{system} on {words}, blocks of {size}: tokens and logits of the file path"
                check(name, "equal to the bit", model.equal, system, path, words, wanted[system])
    check("4 MiB over commands of at most MDTS", "equal, 32 KiB each", limits)
    for path in (block("large", 2), passthrough("large", 2)):
        faults(path)
    for number in (1, 2):
        path = block("small", number)
        check(f"{path} outside of the KV: stamp, pattern, end", "unchanged", unchanged, path)
        check(f"{path} after TRIM", "KV reads as zeros", trimmed, path)
    check("commands over scattered pages", "equal", many_threads)
    bad = (model.answer, "dualblade", passthrough("large", 2))
    check("dualblade over blocks that cannot be read", "one line", refusal, "failed at layer", DriveError, *bad)
    for path in (passthrough("multi", 1), block("multi", 1)):
        detached(model, path, wanted["dualblade"])
    subprocess.run([BUSYBOX, "umount", FILES], check=True)
    reload(io_queue_depth=2)
    check("a queue of two entries, full", "equal", many_threads)
    mount_files()
    say = lambda step: print("working", step, flush=True) if step == 3 else False  # noqa: E731  (now the host kills us)
    model.answer("dualblade", passthrough("small", 1), 500, say)


def second() -> None:
    """After the first boot was killed while it worked on the first namespace."""
    mount_files()
    check("killed in mid-run: stamp, pattern, end", "unchanged", unchanged, block("small", 1))
    model = Model()
    wanted = model.answer("dualblade", None)
    for words, path in both(1).items():
        check(f"the next run, on {words}", "equal", model.equal, "dualblade", path, words, wanted)


if __name__ == "__main__":
    {"first": first, "second": second}[sys.argv[1]]()
