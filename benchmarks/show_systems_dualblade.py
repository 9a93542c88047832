"""Measure all machine-checkable claims about `dualblade` and `flexgen`. Part of `make show-systems`.

MIB=512 sets the KV's MiB, REPEATS=5 the repeats, DRIVE=out the folder on the benchmarked drive. The cgroup needs root.
"""

import os
import sys
from pathlib import Path

from benchmarks import dualblade
from benchmarks.claims import Claim, tests, verdict
from benchmarks.memory_cgroup import CgroupError

MIB, REPEATS = int(os.environ.get("MIB", "512")), int(os.environ.get("REPEATS", "5"))
NOISE = 0.1  # of a median over the repeats on an idle machine; a busy one misses the bars, and should


def lossless() -> list[Claim]:
    return [
        tests(
            "dualblade and flexgen: tokens equal full's, whatever path, budget and pipeline", "tests/test_streamed.py"
        ).show(),
        tests(
            "planner: extents never overlap, budgets hold, cgroup v1 and v2 are read", "tests/test_planner.py"
        ).show(),
        tests(
            "raw device: works if stamped; file system, partition table, mount refused", "tests/test_raw_device.py"
        ).show(),
    ]


def under_a_cgroup() -> list[Claim]:
    """Claim check of DUAL-BLADE: at every limit the two paths together are at least as fast as the better one alone."""
    drive = Path(os.environ.get("DRIVE", "out"))
    drive.mkdir(parents=True, exist_ok=True)
    try:
        rows = dualblade.measure(MIB, REPEATS, drive, report=lambda line: print("        " + line, flush=True))
    except CgroupError as error:
        return [Claim("both paths under a memory cgroup", f"not measured: {error}", "measured", False).show()]
    import pandas as pd

    frame, claims = pd.DataFrame(rows), []
    for ratio, part in frame.groupby("ratio"):
        ms, hits = (part.pivot(index="repeat", columns="way", values=name) for name in ("ms", "hit_rate"))
        better = ms[["page-cache", "direct"]].median().idxmin()
        versus = (ms["dual"] / ms[better]).median()
        times = ", ".join(f"{way} {ms[way].median():.0f} ({ms[way].min():.0f}-{ms[way].max():.0f})" for way in ms)
        text = f"KV {ratio:g}x the cache: ms a step: {times}; dual over {better}"
        claims.append(Claim(text, f"{versus:.2f}", f"at most 1 + noise {NOISE}", versus <= 1 + NOISE))
        page = hits["page-cache"].median()
        if ratio < 1:
            claims.append(Claim(f"KV {ratio:g}x: hit rate of page cache only", f"{page:.0%}", "95 %", page >= 0.95))
            gain = (ms["page-cache"] / ms["dual"]).median()
            text = f"KV {ratio:g}x: all fits, so page cache only over dual gains nothing"
            claims.append(Claim(text, f"{gain:.2f}", f"1 within noise {NOISE}", abs(gain - 1) <= NOISE))
        if ratio > 1:
            text = f"KV {ratio:g}x: hit rate of page cache only collapses, though {1 / ratio:.0%} would fit"
            claims.append(Claim(text, f"{page:.0%}", f"below half of that, {0.5 / ratio:.0%}", page < 0.5 / ratio))
            near = hits["dual"].median()
            text = f"KV {ratio:g}x: hit rate of dual's tensors in the page cache"
            claims.append(Claim(text, f"{near:.0%}", "95 %", near >= 0.95))
        if ratio == 2:
            gain = (ms["page-cache"] / ms["dual"]).median()
            claims.append(Claim("KV 2x: page cache only over dual", f"{gain:.2f}x", "1.5x", gain >= 1.5))
    return [claim.show() for claim in claims]


def claims() -> list[Claim]:
    """All claims, each printed as soon as it is measured."""
    return [*lossless(), *under_a_cgroup()]


if __name__ == "__main__":
    sys.exit(verdict(claims()))
