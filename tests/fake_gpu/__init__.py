"""A stand-in for a GPU: tensors that say `cuda:0`, lie in host memory behind a wrapper, and refuse what a GPU would.

    with FakeGpu() as gpu:
        model = gpu.take(model)  # its weights, to the device
        ...
    assert not gpu.hazards

What it finds
  mixing     an op on device and host tensors (0-dim host scalars, copies and host indices excepted, as in CUDA)
  pointers   data_ptr() or numpy() of device memory: a C kernel would read it and crash
  inference  writes to inference tensors outside of inference mode
  races      an access on one stream that is not ordered after a conflicting one on another; memory freed too early
  lateness   copies that the host does not wait for land as late as CUDA allows: down ones when the host has waited,
             up ones at the next launch on their stream; a source that changes before that is reported
and it counts what makes the host wait, by line and thread. It has no kernels of a GPU's own, one device, and no times.
"""

import collections
import contextlib
import ctypes
import hashlib
import shutil
import subprocess
import sys
import threading
import weakref
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import hillinfer
from hillinfer.models import device_codes
from hillinfer.native.build import private_folder
from tests.fake_gpu import clocks
from tests.fake_gpu.clocks import Block, Clock, Copy, Event, Stream, current, host

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
ROOT = str(Path(hillinfer.__file__).parent)
# Ops after which the host waits, besides copies: the size of their output, or a Python number, depends on data.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "unique_dim"}
INDEXED = {"index", "index_put_", "_index_put_impl_", "_unsafe_index"}


class FakeGpuError(RuntimeError):
    """What CUDA would refuse, or crash at."""


class Noted(NamedTuple):
    """Something that the host did with the device. `kind` is D2H, H2D or sync; `how` says whether it waited."""

    kind: str
    how: str
    nbytes: int
    where: str
    thread: str


def why_not() -> str | None:
    """Why the stand-in cannot work here."""
    if torch.cuda.is_available():
        return "there is a GPU: the stand-in would take its place"
    return None if shutil.which("g++") else "the stand-in for a GPU needs g++"


def load_guard() -> None:
    """Without a device guard for CUDA, indexing, copies and SDPA of a tensor that says `cuda` fail. Compiled once."""
    source, root = Path(__file__).with_name("guard.cpp"), Path(torch.__file__).parent
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = private_folder() / f"guard-{digest}.so"
    if not library.exists():
        draft = library.with_suffix(f".{threading.get_native_id()}")
        words = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(source)]
        subprocess.run([*words, f"-L{root}/lib", "-lc10", "-o", str(draft)], check=True, timeout=120)
        draft.replace(library)
    ctypes.CDLL(str(library))


def place() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(ROOT):
        frame = frame.f_back
    if frame is None:
        return "model"
    return f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"


def inner(x):
    return x.inner if isinstance(x, OnDevice) else x


def on_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class OnDevice(torch.Tensor):
    """A tensor on the device: a wrapper around one in host memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, of):
        with torch.inference_mode(of.is_inference()):
            layout = dict(strides=of.stride(), storage_offset=of.storage_offset(), dtype=of.dtype, device=DEVICE)
            return torch.Tensor._make_wrapper_subclass(cls, of.size(), **layout)

    def __init__(self, of):
        key, blocks = of.untyped_storage().data_ptr() or id(of.untyped_storage()), clocks.gpu.blocks
        self.inner, self.block = of, blocks.get(key)
        if self.block is None:
            self.block = blocks[key] = Block(current())  # lives as long as any view

    def __repr__(self):
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self):
        raise FakeGpuError(f"data_ptr() of device memory, for the host, at {place()}")

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    def tolist(self):
        return self.cpu().tolist()

    def is_pinned(self, *_):
        return False

    def pin_memory(self, *_):
        raise RuntimeError("cannot pin 'torch.cuda.Tensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream):
        self.block.recorded.add(stream)

    def __deepcopy__(self, memo):
        return OnDevice(self.inner.clone())

    def span(self) -> tuple[int, int]:
        size, of = self.inner.element_size(), self.inner
        low, last = of.storage_offset(), sum((n - 1) * abs(s) for n, s in zip(of.shape, of.stride(), strict=True))
        return low * size, (low + last + 1) * size

    def use(self, stream: Stream, tick: int, write: bool) -> None:
        if self.numel():
            self.block.use(self.span(), stream, tick, write, place())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return clocks.gpu.run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees the factories, which have no tensor of the device among their arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return clocks.gpu.run(func, args, kwargs or {})


class FakeGpu:
    def __init__(self):
        self.blocks = weakref.WeakValueDictionary()  # by address of the storage
        self.pinned, self.hazards, self.log = set(), collections.Counter(), []
        self.default, self.launches, self.lock = Stream(), 0, threading.RLock()

    # -- what was seen -----------------------------------------------------------------------------------------

    def note(self, kind: str, how: str, nbytes: int) -> None:
        thread = threading.current_thread().name.rpartition("_")[0] or "main"
        self.log.append(Noted(kind, how, nbytes, place(), thread))

    def hazard(self, kind: str, text: str) -> None:
        self.hazards[f"{kind}: {text}"] += 1

    def waits(self, thread: str | None = None, model: bool = False) -> collections.Counter:
        """How often the host waited, by line; of one thread, and without the model's own waits."""
        seen = [x for x in self.log if x.how != "async" and thread in (None, x.thread)]
        return collections.Counter(
            f"{x.kind} {x.how} {x.where} [{x.thread}]" for x in seen if model or x.where != "model"
        )

    def clear(self) -> None:
        self.log.clear()
        self.launches = 0

    # -- operations --------------------------------------------------------------------------------------------

    def run(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        flat, _ = tree_flatten((args, kwargs))
        ours, goes = [x for x in flat if isinstance(x, OnDevice)], on_gpu(kwargs.get("device"))
        with self.lock:
            if name == "is_pinned":
                return not ours and args[0].untyped_storage().data_ptr() in self.pinned
            if name in ("_pin_memory", "pin_memory") or kwargs.get("pin_memory"):
                return self._pin(args[0].clone() if "pin" in name else func(*args, **kwargs | {"pin_memory": False}))
            if not ours and not goes and name != "to":
                return func(*args, **kwargs)
            if name == "to":  # comes whole in inference mode
                return self._to(func, args, kwargs)
            if name == "copy_":
                return self._copy(args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
            if name == "_to_copy":
                return self._to_copy(args[0], **kwargs)
            self._check_mixing(func, name, args, flat, ours)
            return self._launch(func, name, args, kwargs | ({"device": "cpu"} if goes else {}), ours)

    def _check_mixing(self, func, name, args, flat, ours) -> None:
        hosts = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) and x.dim()]
        indices = args[1] if name in INDEXED else []
        if hosts and ours:
            values = (
                name.startswith(("index_put", "_index_put")) and not isinstance(args[2], OnDevice) and args[2].dim()
            )
            if name not in INDEXED or values or not isinstance(args[0], OnDevice):
                raise FakeGpuError(f"{func}: tensors on cuda:0 and cpu at {place()}")
            self._wait("index", sum(x.nbytes for x in hosts), "H2D")
        if any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices):
            self._wait("by a mask")
        if name in WAITS:
            self._wait(name)

    def _launch(self, func, name, args, kwargs, ours):
        if name == "_fused_sdp_choice":
            return 0  # the plain form: it decomposes
        written = set()
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for x in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(x, OnDevice):
                        written.add(id(x))
                        self._check_inference(x, name)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        stream, tick = current(), 0
        if not views:
            stream.land()
            tick = self._tick(stream)
            for x in ours:
                x.use(stream, tick, id(x) in written)
        back = {id(x.inner): x for x in ours}
        plain, named = tree_map(inner, (args, kwargs))
        if func is aten.bmm.dtype:  # products in the type of the sums: for the CPU's kernels both in fp32
            out = torch.bmm(plain[0].float(), plain[1].float()).to(plain[2])
        elif name == "histc":  # of integers on CUDA only
            out = func(plain[0].float(), *plain[1:], **named).to(plain[0].dtype)
        else:
            out = func(*plain, **named)

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            made = back.get(id(x))
            if made is None:
                made = OnDevice(x)
                if not views and not made.block.uses:
                    made.use(stream, tick, True)
            return made

        flat, spec = tree_flatten(out)
        return tree_unflatten([wrap(x) for x in flat], spec)

    def _tick(self, stream: Stream) -> int:
        self.launches += 1
        return stream.tick()

    def _check_inference(self, x: OnDevice, name: str) -> None:
        if x.inner.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"Inplace update to inference tensor outside InferenceMode ({name} at {place()})")

    def _wait(self, what: str, nbytes: int = 0, kind: str = "sync") -> None:
        """The host waits for the current stream."""
        stream = current()
        stream.tick()
        stream.over()
        host().merge(stream.clock)
        self.note(kind, what, nbytes)

    def _pin(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        self.pinned.add(storage.data_ptr())
        weakref.finalize(storage, self.pinned.discard, storage.data_ptr())
        return x

    # -- copies ------------------------------------------------------------------------------------------------

    def _to(self, func, args, kwargs):
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        me, like = given["self"], given.get("other", given["self"])
        device, dtype = (given.get(name) or getattr(like, name) for name in ("device", "dtype"))
        device = DEVICE if on_gpu(device) else torch.device(device)
        if not isinstance(me, OnDevice) and device.type == "cpu":
            return func(*args, **kwargs)
        if device == me.device and dtype == me.dtype and not given.get("copy"):
            return me
        return self._to_copy(me, dtype=dtype, device=device, non_blocking=given.get("non_blocking", False))

    def _to_copy(self, src, dtype=None, device=None, non_blocking=False, memory_format=None, **_):
        up, of = on_gpu(src.device if device is None else device), inner(src)
        form = {} if memory_format is None else {"memory_format": memory_format}
        if up and isinstance(src, OnDevice):
            stream = current()
            stream.land()
            tick = self._tick(stream)
            src.use(stream, tick, False)
            out = OnDevice(aten._to_copy(of, dtype=dtype, **form))
            out.use(stream, tick, True)
            return out
        out = torch.empty_like(of, dtype=dtype or of.dtype, **form)
        if up:
            out = OnDevice(out)
        elif non_blocking and isinstance(src, OnDevice):
            self._pin(out)  # torch takes it from a cache of pinned blocks
        return self._copy(out, src, non_blocking)

    def _copy(self, out, src, non_blocking):
        a, b, stream = inner(out), inner(src), current()
        if not isinstance(out, OnDevice) and not isinstance(src, OnDevice):
            return out.copy_(src)
        stream.land()
        tick = self._tick(stream)
        for x, write in ((out, True), (src, False)):
            if isinstance(x, OnDevice):
                if write:
                    self._check_inference(x, "copy_")
                x.use(stream, tick, write)
        down, there = not isinstance(out, OnDevice), isinstance(src, OnDevice)
        if (there and not down) or (not there and b.numel() == 1 and not b.dim()):  # within the device; a host's scalar
            a.copy_(b)
            return out
        kind, nbytes, home = (
            ("D2H" if down else "H2D"),
            b.numel() * max(a.element_size(), b.element_size()),
            a if down else b,
        )
        if not (non_blocking and home.untyped_storage().data_ptr() in self.pinned):
            if non_blocking:
                self.hazard("pageable", f"{kind} without waiting, of memory that is not pinned, at {place()}")
            stream.over()
            a.copy_(b)
            host().merge(stream.clock)
            self.note(kind, "copy", nbytes)
            return out
        self.note(kind, "async", nbytes)
        mode = torch.is_inference_mode_enabled()
        if down:
            then = b.clone()  # what later work on the stream writes comes after
            a.fill_(float("nan") if a.is_floating_point() else 77)

            def land():
                with torch.inference_mode(mode):
                    a.copy_(then)

            stream.copies.append(Copy(tick, True, land))
            return out
        before, where = checksum(b), place()

        def land():
            with torch.inference_mode(mode):
                a.copy_(b)

        def check():
            if checksum(b) != before:
                self.hazard("pinned", f"the source changed before the copy of it was over: {where}")

        stream.copies.append(Copy(tick, False, land, check))
        return out

    # -- on and off --------------------------------------------------------------------------------------------

    def __enter__(self):
        load_guard()
        clocks.gpu, self.stack = self, contextlib.ExitStack()
        factories = torch.utils._device._device_constructors  # torch keeps the functions that a default device concerns
        self.stack.callback(factories.cache_clear)
        for owner, name, value in self._patches():
            undo = (setattr, owner, name, getattr(owner, name)) if name in vars(owner) else (delattr, owner, name)
            self.stack.callback(*undo)
            setattr(owner, name, value)
        self.stack.callback(device_codes.sums.cache_clear)  # it is of this stand-in
        factories.cache_clear()
        self.stack.enter_context(Mode())
        return self

    def __exit__(self, *_):
        self.stack.close()
        clocks.gpu = None

    def take(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module with its weights on the device."""
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and not isinstance(p, OnDevice):
                    part._parameters[name] = torch.nn.Parameter(OnDevice(p.detach().clone()), requires_grad=False)
            for name, b in part._buffers.items():
                if b is not None and not isinstance(b, OnDevice):
                    part._buffers[name] = OnDevice(b.detach().clone())
        return module

    def _patches(self) -> list[tuple]:
        """(owner, name, value) of all that stands for CUDA: the runtime, what goes past the modes, and threads, which
        start in the mode and hand on what they know to be over.
        """
        cuda, tensor_to, make, run = torch.cuda, torch.Tensor.to, torch.tensor, threading.Thread.run
        submit, result, shutdown = ThreadPoolExecutor.submit, Future.result, ThreadPoolExecutor.shutdown
        known_of = weakref.WeakKeyDictionary()

        def to(x, *args, **kwargs):  # without an index torch asks CUDA itself for one
            args = [DEVICE if isinstance(a, str | torch.device) and on_gpu(a) else a for a in args]
            if on_gpu(kwargs.get("device")):
                kwargs["device"] = DEVICE
            return tensor_to(x, *args, **kwargs)

        def tensor(data, *args, device=None, **kwargs):
            if isinstance(data, OnDevice):
                return data.clone()
            out = make(data, *args, **kwargs, device="cpu")
            return out.to(DEVICE) if on_gpu(device or torch.empty(0).device) else out

        def run_in_mode(thread):
            with Mode():
                run(thread)

        def submit_knowing(pool, job, *args, **kwargs):
            known, ready = Clock(host()), threading.Event()

            def whole():
                ready.wait()
                host().merge(known)
                try:
                    return job(*args, **kwargs)
                finally:
                    future.known = Clock(host())
                    known_of.setdefault(pool, Clock()).merge(future.known)

            future = submit(pool, whole)
            ready.set()
            return future

        def result_knowing(future, timeout=None):
            try:
                return result(future, timeout)
            finally:
                host().merge(getattr(future, "known", {}))

        def shutdown_knowing(pool, wait=True, **kwargs):
            shutdown(pool, wait, **kwargs)
            host().merge(known_of.get(pool, {}) if wait else {})

        runtime = {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda stream: contextlib.nullcontext() if stream is None else stream,
            "synchronize": lambda device=None: self._wait("torch.cuda.synchronize"),
            "current_stream": lambda device=None: current(),
            "default_stream": lambda device=None: self.default,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "get_device_name": lambda *_: "a stand-in",
            "get_device_capability": lambda *_: (8, 0),
            "mem_get_info": lambda *_: (1 << 34, 1 << 34),
            "max_memory_allocated": lambda *_: 0,
            "memory_allocated": lambda *_: 0,
            "is_initialized": lambda: True,
            **dict.fromkeys(("_lazy_init", "empty_cache", "reset_peak_memory_stats"), lambda *_: None),
        }
        return [
            *((cuda, name, value) for name, value in runtime.items()),
            (torch, "Stream", Stream),
            (torch, "Event", Event),
            (torch.accelerator, "current_stream", lambda device=None: current()),
            (torch, "tensor", tensor),
            (torch.Tensor, "to", to),
            (threading.Thread, "run", run_in_mode),
            (ThreadPoolExecutor, "submit", submit_knowing),
            (ThreadPoolExecutor, "shutdown", shutdown_knowing),
            (Future, "result", result_knowing),
        ]


def checksum(x: torch.Tensor) -> int:
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy()) if x.numel() else 0
