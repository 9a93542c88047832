"""Transfer buffers for layers: attention reads one while the drive fills the other."""

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from hillinfer.attention import to_device
from hillinfer.growable import aligned
from hillinfer.systems.lossless.plan import SPANS
from hillinfer.tiers.block_file import BLOCK
from hillinfer.timeline import Track


@dataclass
class Slot:
    """K and V of one layer, read from their paths and copied to the device.

    The host buffer is page-aligned, and pinned with a GPU: the drive writes into it and the device reads from it,
    without a copy in between.
    """

    host: torch.Tensor  # uint8 (2, bytes of a tensor)
    device: torch.Tensor  # its copy on the GPU; without one, the same tensor
    valid: list[int] = field(default_factory=lambda: [0, 0])  # bytes of K and of V loaded
    loading: list[Future] = field(default_factory=list)
    free: torch.Event | None = None  # recorded when the GPU was done with the previous contents, or tenant


class Slots:
    """The transfer buffers of one `Tensors`, and a copy thread each for K and V (DUAL-BLADE section 3.2).

    Intra-path: both threads read at the same time, each with half of the reads in flight. Cross-path (`staggered`):
    one thread has the drive to itself while the other copies to the device.
    """

    COUNT = 2

    def __init__(self, tensors, staggered: Callable[[], bool], prefetch: bool):
        self.tensors, self.staggered, self.prefetch = tensors, staggered, prefetch
        self.slots: dict[int, Slot] = {}  # layer -> its buffer, least recently used first; negative: none yet
        self.attended: int | None = None  # layer whose buffer the running attention reads
        self._threads = [ThreadPoolExecutor(1, f"hillinfer-{name}") for name in "kv"]
        self._turn = threading.Lock()
        device = tensors.geometry.device
        self._copies = [torch.Stream(device) for _ in "kv"] if device.type != "cpu" else None

    @property
    def nbytes(self) -> tuple[int, int]:
        """On the device and on the host."""
        host = sum(slot.host.nbytes for slot in self.slots.values())
        return host if self._copies else 0, host

    def take(self, layer: int, n: int, track: Track | None = None) -> torch.Tensor:
        """The layer's n tokens, (B, n, 2, Hkv, D) on the model's device, valid until `release` or the next `take`.

        Loads are recorded in `track` by the calling thread.
        """
        if self.attended != layer:
            self.release()
        self.attended, slot = layer, self._load(layer)
        if self.prefetch:
            self._load(self._after(layer, 1))
        start = time.perf_counter_ns()
        spans = [span for future in slot.loading for span in future.result()]
        slot.loading = []
        spans.append(("cpu", "wait", start, 0, time.perf_counter_ns()))
        for i, tensor in enumerate(self.tensors.pair(layer)):
            spans += self._fill(slot, i, tensor, tensor.flushed, False)  # written since the load began
            tail = slice(tensor.flushed, tensor.flushed + len(tensor.tail))
            slot.device[i, tail] = to_device(torch.from_numpy(tensor.tail), slot.device.device)
        for span in spans if track is not None else ():
            track.add(*span)
        return self.tensors.view(slot.device, n)

    def release(self) -> None:
        """The attention to the taken layer is done: load the layer after the next into its buffer."""
        layer, self.attended = self.attended, None
        if layer is None:
            return
        if self._copies:
            slot = self.slots[layer]
            slot.free = torch.accelerator.current_stream(slot.device.device).record_event()
        if self.prefetch:
            self._load(self._after(layer, len(self.slots)))

    def truncate(self, layer: int) -> None:
        """The layer's tensors were truncated: what is loaded is valid only as far as they are flushed."""
        if slot := self.slots.get(layer):
            wait(slot.loading)
            flushed = [tensor.flushed for tensor in self.tensors.pair(layer)]
            slot.valid = list(map(min, slot.valid, flushed))

    def drop(self) -> None:
        """Wait for loads in flight and free the buffers."""
        for slot in self.slots.values():
            wait(slot.loading)
        self.slots, self.attended = {}, None

    def close(self) -> None:
        for thread in self._threads:  # waits for running loads; waiting for cancelled ones would never end
            thread.shutdown(wait=True, cancel_futures=True)
        self.slots, self.attended = {}, None

    def _after(self, layer: int, ahead: int) -> int:
        """The layer streamed `ahead` layers after this one; after the last comes the first of the next step."""
        return self._streamed[(self._streamed.index(layer) + ahead) % len(self._streamed)]

    def _load(self, layer: int) -> Slot:
        """The layer's buffer; if it has none, the least recently used one, where loading it begins."""
        if not self.slots:
            layers = range(self.tensors.layers)
            self._streamed = [layer for layer in layers if not self.tensors.is_resident(layer)]
            _trim_heap()
            self.slots = {-1 - i: self._slot() for i in range(min(self.COUNT, len(self._streamed)))}
        loaded = layer in self.slots
        key = layer if loaded else next(iter(self.slots))
        slot, staggered = self.slots[key], self.staggered()
        if not loaded:
            wait(slot.loading)
            slot.valid = [0, 0]
            slot.loading = [
                thread.submit(self._fill, slot, i, tensor, tensor.flushed, staggered)
                for i, (thread, tensor) in enumerate(zip(self._threads, self.tensors.pair(layer), strict=True))
            ]
        del self.slots[key]
        self.slots[layer] = slot
        return slot

    @torch.inference_mode(False)  # or it could not be written to outside of it
    def _slot(self) -> Slot:
        nbytes = 2 * self.tensors.bytes
        if self._copies is None:
            host = torch.from_numpy(aligned(nbytes)).view(2, -1)
            return Slot(host, host)
        pinned = torch.empty(nbytes + BLOCK, dtype=torch.uint8, device="cpu", pin_memory=True)
        host = pinned[-pinned.data_ptr() % BLOCK :][:nbytes].view(2, -1)
        device = torch.empty_like(host, device=self.tensors.geometry.device)
        return Slot(host, device, free=torch.accelerator.current_stream(device.device).record_event())

    def _fill(self, slot: Slot, i: int, tensor, end: int, staggered: bool) -> list[tuple]:
        """Load a tensor's bytes up to `end` into the buffer and onto the device. Returns arguments of `Track.add`."""
        start = slot.valid[i]
        if start >= end:
            return []
        tensor.settle()
        with self._turn if staggered else nullcontext():
            began, buffer = time.perf_counter_ns(), slot.host[i, start:end]
            read = self.tensors.read(tensor, start, end, buffer.numpy(), 1 if staggered else 0.5)
        done = time.perf_counter_ns()
        spans = [(*SPANS[path], began, nbytes, done) for path, nbytes in read.items()]
        if slot.device is not slot.host:
            with self._copies[i]:
                if slot.free is not None:
                    slot.free.wait(self._copies[i])
                slot.device[i, start:end].copy_(buffer, non_blocking=True)
            self._copies[i].synchronize()
            spans.append(("link", "transfer", done, end - start, time.perf_counter_ns()))
        slot.valid[i] = end
        return spans


def _trim_heap() -> None:
    """Return memory freed after prefill to the system: malloc keeps 150 MiB and more, lost to the page cache."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it
        trim(0)
