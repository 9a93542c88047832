"""A pyxrt that is as strict as the real one's oldest supported release (2021.1), over the simulated kernel or numpy.

It has what hillinfer uses and refuses what the real one refuses: scalars beyond a C int, calls with fewer arguments
than 2021.1 wants, buffers of another device, a kernel that is not in the xclbin. Host and device memory are apart, as
on a card: what was not synced is not there. P2P buffers are the device's own memory.
"""

import enum
import mmap
import threading
import uuid
from pathlib import Path

import numpy as np

DEVICES = 1
P2P = True
MAGIC = b"xclbin2\0fake"
open_buffers: set = set()  # of bo, by id


class xclBOSyncDirection(enum.Enum):
    XCL_BO_SYNC_BO_TO_DEVICE = 0
    XCL_BO_SYNC_BO_FROM_DEVICE = 1


class ert_cmd_state(enum.Enum):
    ERT_CMD_STATE_NEW = 1
    ERT_CMD_STATE_COMPLETED = 4
    ERT_CMD_STATE_ERROR = 5
    ERT_CMD_STATE_ABORT = 6
    ERT_CMD_STATE_TIMEOUT = 8


RUNNING = object()  # the real binding has no name for this state


class device:
    backend = None  # callable(memory, arguments) -> false, true or a state: one run of the kernel; set by the test

    def __init__(self, index: int):
        if type(index) is not int:
            raise TypeError("device(): incompatible constructor arguments")  # 2021.1 knows no BDF
        if index >= DEVICES:
            raise RuntimeError("No such device with index '" + str(index) + "'")
        self.memory: dict[int, np.ndarray] = {}  # address -> bytes
        self.next, self.busy, self.loaded = 1 << 32, threading.Lock(), None

    def load_xclbin(self, path: str):
        if type(path) is not str:
            raise TypeError("load_xclbin(): incompatible function arguments")
        data = Path(path).read_bytes()
        if not data.startswith(MAGIC):
            raise RuntimeError("failed to load xclbin: Invalid argument")
        self.loaded = uuid.uuid4()
        return self.loaded


class kernel:
    exclusive, shared, none = "exclusive", "shared", "none"

    def __init__(self, d: device, u, name: str, mode: str):
        if u != d.loaded or name != "cec_kernel":
            raise RuntimeError("No such kernel '" + name + "'")
        self.device = d

    def group_id(self, argument: int) -> int:
        if argument > 2:
            raise RuntimeError("argument is not connected to memory")
        return 0


class bo:
    normal, p2p = "normal", "p2p"

    def __init__(self, d: device, size: int, flags: str, group: int):
        if flags == "p2p" and not P2P:
            raise RuntimeError("failed to allocate p2p buffer: No such device (no iomem)")
        if size <= 0:
            raise RuntimeError("invalid buffer size")
        self.device, self.size = d, size
        self.host = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        self.card = self.host if flags == "p2p" else np.frombuffer(mmap.mmap(-1, size), np.uint8)
        if flags != "p2p":
            self.card[:] = 0xA5
        self.address, d.next = d.next, d.next + -(-size // 4096) * 4096 + 4096
        d.memory[self.address] = self.card
        open_buffers.add(id(self))

    def map(self) -> memoryview:
        return memoryview(self.host)

    def sync(self, direction: xclBOSyncDirection, size: int, offset: int) -> None:
        if offset < 0 or size <= 0 or offset + size > self.size:
            raise RuntimeError("Invalid offset and size when syncing buffer")
        part = slice(offset, offset + size)
        if direction is xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE:
            self.card[part] = self.host[part]
        else:
            self.host[part] = self.card[part]

    def __del__(self):
        if hasattr(self, "address"):
            self.device.memory.pop(self.address, None)
            open_buffers.discard(id(self))


class run:
    def __init__(self, k: kernel):
        self.kernel, self.arguments, self.thread, self.now = k, {}, None, ert_cmd_state.ERT_CMD_STATE_NEW

    def set_arg(self, index: int, value) -> None:
        if isinstance(value, bo):
            if index > 2:
                raise RuntimeError("buffer given for a scalar")
            if value.device is not self.kernel.device:
                raise RuntimeError("buffer of another device")
        elif type(value) is not int or not -(1 << 31) <= value < 1 << 31:
            raise TypeError("set_arg(): incompatible function arguments")  # a C int
        self.arguments[index] = value

    def start(self) -> None:
        if sorted(self.arguments) != list(range(10)):
            raise RuntimeError("kernel arguments are not set")
        if self.now is RUNNING:
            raise RuntimeError("run is already started")
        self.now = RUNNING
        given = [value.address if isinstance(value, bo) else value for _, value in sorted(self.arguments.items())]
        self.kept = list(self.arguments.values())  # the real one holds its buffers, too
        self.thread = threading.Thread(target=self._work, args=(given,), name="fake-xrt", daemon=True)
        self.thread.start()

    def _work(self, given: list[int]) -> None:
        with self.kernel.device.busy:
            done = device.backend(self.kernel.device.memory, given)
        if done:  # a kernel that hangs stays running
            self.now = done if isinstance(done, ert_cmd_state) else ert_cmd_state.ERT_CMD_STATE_COMPLETED

    def state(self) -> ert_cmd_state:
        return self.now

    def wait(self, timeout_ms: int) -> ert_cmd_state:
        raise AssertionError("wait() holds the interpreter's lock while the card works: poll state()")
