"""Two buffers that layers take turns in: one is attended to while the drive fills the other."""

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from hillinfer.systems.lossless.plan import DIRECT
from hillinfer.tiers.block_file import BLOCK, aligned
from hillinfer.timeline import Track


@dataclass
class Slot:
    """K and V of one layer, read from their paths and copied to the device.

    Page-aligned, and pinned beside a GPU: the drive writes into it and the device reads from it, with no copy between.
    """

    host: np.ndarray  # (2, bytes of a tensor)
    pinned: torch.Tensor  # the same memory
    device: torch.Tensor | None  # its copy on the model's device; None where that is the host
    layer: int | None = None
    valid: list[int] = field(default_factory=lambda: [0, 0])  # bytes of K and of V that are here
    loading: list[Future] = field(default_factory=list)
    free: torch.cuda.Event | None = None  # the device is through with what was here before


class Slots:
    """The buffers of one `Tensors`, and a copy thread each for K and V (DUAL-BLADE section 3.2).

    Intra-path: both threads read at once, each with half of the reads in flight. Cross-path, `staggered`: one has the
    drive to itself while the other copies to the device. Both then read whole tensors, one after the other.
    """

    COUNT = 2

    def __init__(self, tensors, staggered: Callable[[], bool], prefetch: bool):
        self.tensors, self.staggered, self.prefetch = tensors, staggered, prefetch
        self.slots: list[Slot] = []
        self.held: Slot | None = None  # what the running attention reads
        self._threads = [ThreadPoolExecutor(1, f"hillinfer-{name}") for name in "kv"]
        self._turn = threading.Lock()
        device = tensors.geometry.device
        self._copies = [torch.cuda.Stream(device) for _ in "kv"] if device.type == "cuda" else None

    @property
    def nbytes(self) -> tuple[int, int]:
        """On the device and on the host."""
        host = sum(slot.host.nbytes for slot in self.slots)
        return host if self._copies else 0, host

    def take(self, layer: int, n: int, track: Track | None = None) -> torch.Tensor:
        """The layer's n tokens, (B, n, 2, Hkv, D) on the model's device, valid until `release` or the next `take`.

        What loading them took is written to `track`, by the thread that calls.
        """
        if self.held is not None and self.held.layer != layer:
            self.release()
        self.held = slot = self._load(layer)
        if self.prefetch:
            self._load(self._after(layer, 1))
        start = time.perf_counter_ns()
        work = [span for future in slot.loading for span in future.result()]
        slot.loading = []
        work.append(("cpu", "wait", start, 0, time.perf_counter_ns()))
        for i, tensor in enumerate(self.tensors.pair(layer)):
            work += self._fill(slot, i, tensor, tensor.flushed, False)  # what was written since it was asked for
            tail = slice(tensor.flushed, tensor.flushed + len(tensor.tail))
            slot.host[i, tail] = tensor.tail
            if slot.device is not None:
                slot.device[i, tail].copy_(slot.pinned[i, tail])
        for span in work if track is not None else ():
            track.add(*span)
        return self.tensors.view(slot.pinned if slot.device is None else slot.device, n)

    def release(self) -> None:
        """The held layer's attention is through: its buffer is for the layer after the next."""
        if self.held is None:
            return
        slot, self.held = self.held, None
        if slot.device is not None:
            slot.free = torch.cuda.current_stream(slot.device.device).record_event()
        if self.prefetch:
            self._load(self._after(slot.layer, len(self.slots)), slot)

    def truncate(self, layer: int) -> None:
        """The layer's tensors were cut: what is here counts no further than what is on their paths."""
        for slot in self.slots:
            if slot.layer == layer:
                wait(slot.loading)
                slot.valid = [
                    min(valid, t.flushed) for valid, t in zip(slot.valid, self.tensors.pair(layer), strict=True)
                ]

    def drop(self) -> None:
        """Wait for what is under way and forget the buffers."""
        for slot in self.slots:
            wait(slot.loading)
        self.slots, self.held = [], None

    def close(self) -> None:
        for thread in self._threads:  # this waits for what runs; to wait for what it cancels would be forever
            thread.shutdown(wait=True, cancel_futures=True)
        self.slots, self.held = [], None

    def _after(self, layer: int, ahead: int) -> int:
        """The layer that is streamed so many after this one; after the last comes the next step's first."""
        streamed = self._streamed
        return streamed[(streamed.index(layer) + ahead) % len(streamed)]

    def _load(self, layer: int, into: Slot | None = None) -> Slot:
        """The buffer that has the layer, or from now on is being filled with it; by default any that is not held."""
        if not self.slots:
            layers = range(self.tensors.layers)
            self._streamed = [layer for layer in layers if not self.tensors.is_resident(layer)]
            _give_back_freed()
            self.slots = [self._slot() for _ in self._streamed[: self.COUNT]]
        for slot in self.slots:
            if slot.layer == layer:
                return slot
        slot = into or next(slot for slot in self.slots if slot is not self.held)
        wait(slot.loading)
        slot.layer, slot.valid = layer, [0, 0]
        slot.loading = [
            thread.submit(self._fill, slot, i, tensor, tensor.flushed, self.staggered())
            for i, (thread, tensor) in enumerate(zip(self._threads, self.tensors.pair(layer), strict=True))
        ]
        return slot

    def _slot(self) -> Slot:
        nbytes, device = self.tensors.bytes, self.tensors.geometry.device
        if self._copies is None:
            host = aligned(2 * nbytes).reshape(2, -1)
            return Slot(host, torch.from_numpy(host), None)
        pinned = torch.empty(2 * nbytes + BLOCK, dtype=torch.uint8, pin_memory=True)
        skip = -pinned.data_ptr() % BLOCK
        pinned = pinned[skip : skip + 2 * nbytes].view(2, -1)
        return Slot(pinned.numpy(), pinned, torch.empty_like(pinned, device=device))

    def _fill(self, slot: Slot, i: int, tensor, end: int, staggered: bool) -> list:
        """Load the tensor's bytes up to `end` into the buffer and onto the device. Returns arguments of `Track.add`."""
        start, work = slot.valid[i], []
        if start >= end:
            return work
        tensor.settle()
        with self._turn if staggered else nullcontext():
            began = time.perf_counter_ns()
            read = self.tensors.read(tensor, start, end, slot.host[i, start:end], 1 if staggered else 0.5)
        done = time.perf_counter_ns()
        for path, nbytes in read.items():
            work.append((*(("drive", "prefetch") if path == DIRECT else ("cpu", "near")), began, nbytes, done))
        if slot.device is not None:
            with torch.cuda.stream(self._copies[i]):
                if slot.free is not None:
                    slot.free.wait(self._copies[i])
                slot.device[i, start:end].copy_(slot.pinned[i, start:end], non_blocking=True)
            self._copies[i].synchronize()
            work.append(("link", "transfer", done, end - start, time.perf_counter_ns()))
        slot.valid[i] = end
        return work


def _give_back_freed() -> None:
    """Let the allocator return what prefill has freed. It keeps 150 MiB and more, which the page cache then lacks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it
        trim(0)
