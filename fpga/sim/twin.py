"""C simulation of the HLS twin: the interface of a simulated kernel, in plain C++."""

import ctypes
import hashlib
import os
import shutil
import subprocess

import numpy as np

from fpga.sim.kernel import CACHE, FPGA, HEADER, Answer, Config, Image, MissingTool

SOURCE = FPGA / "hls" / "cec_kernel.cpp"


def build(config: Config) -> ctypes.CDLL:
    if not shutil.which("g++"):
        raise MissingTool("the C simulation needs a compiler: apt-get install g++")
    path = CACHE / f"hls-{config.name}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        values = dict(KW=config.bits, HEAD_DIM=config.head_dim, G=config.group, LANES=config.lanes, NMAX=config.nmax)
        flags = [f"-D{name}={value}" for name, value in values.items()]
        part = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O2", "-Wno-unknown-pragmas", "-shared", "-fPIC", *flags, "-o", part, SOURCE]
        subprocess.run(command, check=True)
        part.replace(path)
    return ctypes.CDLL(os.fspath(path))


def call(library: ctypes.CDLL, image: Image, **changes: int) -> list[Answer]:
    """Run one image; `changes` overrides scalar arguments by name."""
    names = ("first", "n_tokens", "k", "heads", "mode", "key_stride", "out_stride")
    values = (image.first, image.n, image.k, len(image.codes), image.mode, image.key_stride, image.out_stride)
    scalars = dict(zip(names, values, strict=True)) | changes
    keys, query, out = (aligned(part) for part in (image.keys, image.query, image.out))
    pointers = (ctypes.c_void_p(part.ctypes.data) for part in (keys, query, out))
    library.cec_kernel(*pointers, *(ctypes.c_int(value) for value in scalars.values()))
    image.out[:] = out
    return image.answers()


def aligned(array: np.ndarray) -> np.ndarray:
    """A byte copy, aligned to 64 bytes."""
    raw = np.empty(array.nbytes + HEADER, np.uint8)
    start = -raw.ctypes.data % HEADER
    raw[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return raw[start : start + array.nbytes]
