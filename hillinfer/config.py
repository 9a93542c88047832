"""Settings of a cache, validated on construction."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

from hillinfer import files
from hillinfer.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _share(value) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _whole(value, least: int) -> bool:
    return isinstance(value, int) and value >= least


_RULES = {  # field: (whether a value is valid, fix)
    "alpha": (lambda v: _share(v) and v > 0, "choose a share of the tokens above 0 and up to 1"),
    "sinks": (lambda v: _whole(v, 0), "give a whole number of at least 0"),
    "recent": (lambda v: _whole(v, 1), "give a whole number of at least 1"),
    "io_threads": (lambda v: _whole(v, 1), "give a whole number of at least 1"),
    "max_tokens": (lambda v: v is None or _whole(v, 1), "give a whole number of at least 1"),
    "checksums": (lambda v: isinstance(v, bool), "give true or false"),
    "timeout": (lambda v: isinstance(v, int | float) and 0 < v < 1e6, "give the seconds that the drive may be silent"),
    "pinned": (_share, "give a share of the tokens from 0 to 1"),
    "compress": (lambda v: v == "auto" or _share(v), "give a share from 0 to 1, or auto"),
    "lookahead": (lambda v: v == "auto" or _share(v), "give true, false, a share from 0 to 1, or auto"),
}


def parse_bytes(text: str | int | None) -> int | None:
    """Bytes of `"64MiB"`, `"1.5 GB"` or `4096`; None (no limit) stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS:
        raise UsageError(f"'{text}' is not an amount of memory; write a number with a unit, such as 64MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True)
class Settings:
    """Settings of one cache. The constructor checks values only; `check_folder` checks the drive.

    alpha        share of the cached tokens that a decode step attends to, in (0, 1] (the importance rate of HillInfer
                 section 1.4; usually 0.1 to 0.2)
    host_budget  bytes of host memory for KV records, all layers together; None is the system's default.
                 Key codes are extra: `TieredCache.memory()` reports both
    device_budget  bytes of GPU memory for key codes while the KV is in host memory; None is half of what is free when
                 the first keys come. Codes beyond it are in host memory, and scored there
    drive        folder for the private KV file, made absolute; None keeps all KV in memory
    drive_kind   `ssd`; `xrt`, a SmartSSD, which scores its own records; or `emulated`, a SmartSSD in software
    xclbin       the SmartSSD's kernel (built as in fpga/README.md)
    profile      output of `hillinfer profile`: with a drive that scores, sizes the host's pool for the shortest step,
                 within the host budget
    split        use of the profile: `shortest` step given the measured selection rates, or the `paper`'s closed form
    paced        slow the emulated drive down to a SmartSSD's rates
    sinks        number of first tokens that stay in the window
    recent       number of last tokens that stay in the window
    engine       drive reads: `io_uring`, `threads`, or `auto`, which prefers io_uring
    io_threads   concurrent reads of the `threads` engine
    checksums    verify every 4 KiB block read from the drive
    timeout      seconds without an answer after which the drive counts as stuck and the run ends
    pinned       share of the tokens, newest first, that never leave the hot pool; alpha in HillInfer
    placement    ranking of the hot pool: `hits` (a counter per token and layer), `shared-hits` (the paper's single
                 table for all layers), or the control `lru`
    per_head     each KV head selects for itself; by default where all KV is in memory and the policy allows it
    precision    int8, int4 or int2 key codes (not int2 on a drive that scores); attention keeps the model's precision
    compress     share of the records read from an ssd in INT4, 0 to 1, or "auto": just enough that a layer's transfer
                 takes no longer than its computation. Lossy
    lookahead    score and read the next layer's tokens while a layer computes; changes no output. A fraction in (0, 1)
                 prefetches only that share of the predicted tokens, most confident first. "auto" tries all, 0.6 and
                 none for a few steps each and keeps the fastest
    stream       set by the lossless systems, which stream whole K and V tensors at each step and keep up to host_budget
                 of them near: `host` (in host memory; FlexGen), `dual` (in the page cache, by default the memory
                 limit's remainder; DUAL-BLADE), and its two halves alone, `page-cache` and `direct`
    max_tokens   expected maximum context length. Lossless systems preallocate for it (otherwise capacity doubles when
                 full). `leoam` with a host_budget sizes its index cache from it
    device       raw block device (stamped with `hillinfer stamp`) or NVMe character device for the direct path of a
                 lossless system; None makes it a file in `drive`
    pipelining   schedule of the two threads that copy K and V: `intra` (both read at once), `cross` (one reads while
                 the other copies to the device), or "auto", which tries both for a few steps and keeps the faster
    """

    alpha: float = 0.2
    host_budget: int | str | None = None
    device_budget: int | str | None = None
    drive: str | Path | None = None
    drive_kind: Literal["ssd", "emulated", "xrt"] = "ssd"
    xclbin: str | Path | None = None
    profile: str | Path | None = None
    split: Literal["shortest", "paper"] = "shortest"
    paced: bool = False
    sinks: int = 4
    recent: int = 16
    engine: Literal["auto", "io_uring", "threads"] = "auto"
    io_threads: int = 16
    checksums: bool = True
    timeout: float = 60.0
    pinned: float = 0.0
    placement: Literal["hits", "shared-hits", "lru"] = "hits"
    per_head: bool | None = None
    precision: Literal["int8", "int4", "int2"] = "int8"
    compress: float | str = 0.0
    lookahead: bool | float | str = "auto"
    stream: Literal[None, "host", "dual", "page-cache", "direct"] = None
    max_tokens: int | None = None
    device: str | Path | None = None
    pipelining: Literal["auto", "intra", "cross"] = "auto"

    def __post_init__(self):
        for name, choices in self.__annotations__.items():
            if get_origin(choices) is Literal and (value := getattr(self, name)) not in get_args(choices):
                raise UsageError(f"no {name} '{value}'; choose {', '.join(map(str, get_args(choices)))}")
        for name, (valid, fix) in _RULES.items():
            if not valid(value := getattr(self, name)):
                raise UsageError(f"{name} is {value!r}; {fix}")
        lossless, scores = self.stream is not None, self.drive_kind != "ssd"
        for refused, why in (
            (self.profile and not scores, "profile is for a drive that scores, not an ssd: add drive_kind emulated"),
            (self.paced and self.drive_kind != "emulated", "paced is for the emulated drive: add drive_kind emulated"),
            (self.xclbin is not None and self.drive_kind != "xrt", "an xclbin is for a SmartSSD: add drive_kind xrt"),
            (self.device is not None and not lossless, "a raw device needs a lossless system: dualblade or flexgen"),
            (self.per_head and self.drive is not None, "a record on a drive holds all heads: leave out per_head"),
            (lossless and scores, "a lossless system scores nothing on the drive: leave out drive_kind"),
        ):
            if refused:
                raise UsageError(why)
        for name in ("host_budget", "device_budget"):
            object.__setattr__(self, name, parse_bytes(getattr(self, name)))
        if self.drive is not None:
            object.__setattr__(self, "drive", Path(self.drive).expanduser().absolute())

    @property
    def selects_apart(self) -> bool:
        """Whether KV heads may select for themselves."""
        return self.drive is None if self.per_head is None else self.per_head

    @property
    def bits(self) -> int:
        """Bits per value of a key code."""
        return int(self.precision.removeprefix("int"))

    def budget(self, n: int) -> int:
        """Tokens attended to by a step over n cached tokens: alpha*n, but at least the window."""
        return min(n, max(math.ceil(self.alpha * n - 1e-9), self.sinks + self.recent))


def check_folder(path: str | Path | None) -> Path | None:
    """The folder as an absolute path; None stays None. Removes the files of killed runs.

    Raises UsageError unless a file can be created in it.
    """
    if path is None:
        return None
    folder = Path(path).expanduser().resolve()
    if not folder.exists():
        raise UsageError(f"drive folder {folder} does not exist; make it first (mkdir -p) or name another")
    if not folder.is_dir():
        raise UsageError(f"drive path {folder} is not a folder; name a folder on the drive for the KV cache")
    try:
        files.reclaim(folder, ".hillinfer-", ".drive")
        fd, proof = files.scratch(folder, ".hillinfer-", ".drive")
        proof.unlink()
        os.close(fd)
    except OSError as error:
        fix = "free or unlock it, or name another folder"
        raise UsageError(f"no file can be made in {folder} ({error.strerror}); {fix}") from None
    return folder
