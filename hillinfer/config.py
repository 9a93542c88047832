"""What a user sets, checked before any work starts."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hillinfer import files
from hillinfer.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str | int | None) -> int | None:
    """`"64MiB"`, `"1.5 GB"`, `4096` or None (no limit) to a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS:
        raise UsageError(f"'{text}' is no amount of memory; write a number with a unit, such as 64MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True)
class Settings:
    """How one cache is run.

    alpha        share of the cached tokens that a decode step attends to, in (0, 1] (HillInfer section 1.4 calls it the
                 importance rate; 0.1 to 0.2 is usual)
    host_budget  bytes of host memory for KV records, all layers together; None takes what the system asks for.
                 Key codes are not part of it: `TieredCache.memory()` reports both
    drive        folder for the private KV file; None keeps all KV in memory
    drive_kind   `ssd`; `xrt`, a SmartSSD, which scores what it holds; or `emulated`, one in software
    xclbin       the SmartSSD's kernel (fpga/README.md says how it is made)
    profile      what `hillinfer profile` wrote: with a drive that scores, the host's pool is then as large as makes
                 a step shortest, within the host budget
    split        how a profile is used: for the `shortest` step by what the steps select, or by the `paper`'s form
    paced        slow the emulated drive down to a SmartSSD's rates
    sinks        first tokens that stay on the model's device
    recent       last tokens that stay on the model's device
    engine       how the drive is read: `io_uring`, `threads`, or `auto`, which takes io_uring where it can be had
    io_threads   threads that read the drive at once, where they do
    checksums    whether every 4 KiB block that is read from the drive is compared with what was written to it
    timeout      seconds without any answer from the drive after which it counts as stuck, and the run ends
    pinned       share of the tokens, the newest, that never leave the hot pool; None: alpha, as in HillInfer
    placement    what the hot pool keeps: `hits` (a counter for each token and layer), `shared-hits` (the paper's one
                 table for all layers), or as controls `lru` and `importance`
    precision    int8 or int4, of the key codes that are scored; what is attended to keeps the model's precision
    compress     share of the records read from an ssd that come in INT4, 0 to 1, or "auto": as much as makes a layer's
                 transfer no longer than its computation. Lossy
    lookahead    whether the next layer's tokens are scored and read while a layer computes; changes no output. A share
                 of 1 looks ahead to the surest of them only. "auto" tries all, 0.6 and none for a few steps each, and
                 keeps the fastest
    stream       set by the lossless systems, which stream whole K and V tensors at each step and take host_budget as
                 what may stay: `host` (in host memory; FlexGen), `dual` (in the page cache, by default what the memory
                 limit leaves; DUAL-BLADE), and its two halves alone, `page-cache` and `direct`
    max_tokens   the longest context to come: of systems that stream, whose room else doubles when it is full; of leoam
                 with a host_budget, whose abstracts then get what the pinned records will leave, not a quarter
    device       raw block device (stamped with `hillinfer stamp`), or NVMe character device, for the direct path of a
                 system that streams; None makes it a file in `drive`
    pipelining   of the two threads that copy K and V: `intra` (both read at once), `cross` (one reads while the other
                 copies to the device), or "auto", which tries both for a few steps and keeps the faster
    """

    alpha: float = 0.2
    host_budget: int | str | None = None
    drive: str | Path | None = None
    drive_kind: str = "ssd"
    xclbin: str | Path | None = None
    profile: str | Path | None = None
    split: str = "shortest"
    paced: bool = False
    sinks: int = 4
    recent: int = 16
    engine: str = "auto"
    io_threads: int = 16
    checksums: bool = True
    timeout: float = 60.0
    pinned: float | None = None
    placement: str = "hits"
    precision: str = "int8"
    compress: float | str = 0.0
    lookahead: bool | float | str = "auto"
    stream: str | None = None
    max_tokens: int | None = None
    device: str | Path | None = None
    pipelining: str = "auto"

    def __post_init__(self):
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}, but it is a share of the tokens: choose one above 0 and up to 1")
        for name, least in (("sinks", 0), ("recent", 1), ("io_threads", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)!r}; give a whole number of at least {least}")
        if not isinstance(self.timeout, (int, float)) or not 0 < self.timeout < 1e6:
            raise UsageError(f"timeout is {self.timeout!r}; give the seconds that the drive may be silent")
        for name, known in (
            ("checksums", (True, False)),
            ("drive_kind", ("ssd", "emulated", "xrt")),
            ("placement", ("hits", "shared-hits", "lru", "importance")),
            ("precision", ("int8", "int4")),
            ("split", ("shortest", "paper")),
            ("engine", ("auto", "io_uring", "threads")),
            ("stream", (None, "host", "dual", "page-cache", "direct")),
            ("pipelining", ("auto", "intra", "cross")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"no {name} '{getattr(self, name)}'; choose {', '.join(map(str, known))}")
        if self.compress != "auto" and not (isinstance(self.compress, (int, float)) and 0 <= self.compress <= 1):
            raise UsageError(f"compress is {self.compress!r}; give a share from 0 to 1, or auto")
        if self.lookahead != "auto" and not (isinstance(self.lookahead, (int, float)) and 0 <= self.lookahead <= 1):
            raise UsageError(f"lookahead is {self.lookahead!r}; give true, false, a share from 0 to 1, or auto")
        if self.pinned is not None and not (isinstance(self.pinned, (int, float)) and 0 <= self.pinned <= 1):
            raise UsageError(f"pinned is {self.pinned!r}; give a share of the tokens from 0 to 1")
        for name in ("profile", "paced"):
            if getattr(self, name) and self.drive_kind == "ssd":
                raise UsageError(f"{name} is for a drive that scores, which an ssd does not: add drive_kind emulated")
        if self.max_tokens is not None and (not isinstance(self.max_tokens, int) or self.max_tokens < 1):
            raise UsageError(f"max_tokens is {self.max_tokens!r}; give a whole number of at least 1")
        if self.device is not None and self.stream is None:
            raise UsageError("only systems that stream whole tensors use a raw device: choose dualblade or flexgen")
        if self.stream is not None and self.drive_kind != "ssd":
            raise UsageError("a system that streams whole tensors scores nothing on the drive: leave out drive_kind")
        if self.drive_kind != "emulated" and self.paced:
            raise UsageError("paced is for the emulated drive: add drive_kind emulated")
        if self.xclbin is not None and self.drive_kind != "xrt":
            raise UsageError("an xclbin is for a SmartSSD: add drive_kind xrt")
        object.__setattr__(self, "host_budget", parse_bytes(self.host_budget))
        if self.drive is not None:
            object.__setattr__(self, "drive", check_folder(self.drive))

    @property
    def pin(self) -> float:
        """Share of the tokens that stays in the hot pool by age."""
        return self.alpha if self.pinned is None else self.pinned

    @property
    def bits(self) -> int:
        """Of one key code."""
        return int(self.precision.removeprefix("int"))

    def budget(self, n: int) -> int:
        """Tokens that a step over n cached tokens attends to: alpha*n, never less than the device window holds."""
        return min(n, max(math.ceil(self.alpha * n - 1e-9), self.sinks + self.recent))


def check_folder(path: str | Path) -> Path:
    """The folder as an absolute path, after proof that a file can be made in it."""
    folder = Path(path).expanduser().resolve()
    if not folder.exists():
        raise UsageError(f"drive folder {folder} does not exist; make it first (mkdir -p) or name another")
    if not folder.is_dir():
        raise UsageError(
            f"drive path {folder} is not a folder; name a folder on the drive that should hold the KV cache"
        )
    try:
        files.reclaim(folder, ".hillinfer-", ".drive")
        fd, proof = files.scratch(folder, ".hillinfer-", ".drive")
        proof.unlink()
        os.close(fd)
    except OSError as error:
        raise UsageError(
            f"no file can be made in {folder} ({error.strerror}); free or unlock it, or name another folder"
        ) from None
    return folder
