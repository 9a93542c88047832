"""The modelled time of one piece of work on a profile: its bytes over the throughput of its part."""

import math

from hillinfer.systems.hillinfer.profile import Profile

MODEL = ("dense", "head", "attend")  # the model's own work: on the GPU if there is one
OVERHEAD = ("other", "view")  # of this project's code: free unless measured
RATES = {
    "transfer": "link.to_gpu",
    "weights": "link.to_gpu",
    "store": "link.from_gpu",
    "query": "link.from_gpu",
    "output": "link.to_gpu",
    "read": "drive.read",
    "prefetch": "drive.read",
    "mapped": "drive.mapped",
    "write": "drive.write",
    "evaluate": "scorer.dram_read",
    "scan": "scorer.nand_read",
    "inside": "scorer.nand_read",
}
FIXED = {"synchronize": "link.wait", "threads": "cpu.start", "python": "cpu.python"}  # seconds of a call
DEFAULT_RATES = {"drive": "drive.read", "link": "link.to_gpu"}  # of all other kinds, by lane


def lane_of(profile: Profile, lane: str, kind: str) -> str:
    """The lane of a recorded kind of work on this machine."""
    if kind in MODEL and lane == "cpu" and profile.has("gpu"):
        return "gpu"
    return "cpu" if lane == "gpu" and not profile.has("gpu") else lane


def seconds(
    profile: Profile,
    lane: str,
    kind: str,
    size: float,
    *,
    block: float = math.inf,
    flops: float = 0.0,
    calls: int = 1,
    kernels: int = 1,
    system: str = "",
) -> float:
    """Modelled seconds of `size` bytes (`recording.size_of`), moved in pieces of `block` bytes.

    calls    number of calls, for a measured cost
    kernels  number of launches, each with the part's latency, otherwise

    A profile measured with this project's code has the cost of each kind (and system). Otherwise: size over the part's
    rate, plus latency; for the model's own work the roofline, the longer of reading and computing.
    """
    if kind == "wait":  # a dependency, without work
        return 0.0
    for name in (f"{system}.{kind}", kind):
        if name in profile.kinds:
            return profile.kinds[name].at(size, calls)
    if kind in OVERHEAD:
        return 0.0
    if kind in FIXED:
        return calls * profile.get(FIXED[kind], default=0.0)
    part = lane.partition(":")[0]
    if part == "gpu" or (kind in MODEL and part == "cpu"):
        took = max(size / profile.get(f"{part}.bandwidth"), flops / profile.get(f"{part}.flops"))
    elif kind == "gather" and not profile.has("gpu"):
        took = 0.0  # zero-copy: attention reads the records in place
    elif rate := RATES.get(kind, DEFAULT_RATES.get(part)):
        took = size / profile.get(rate, block)
    else:
        took = size / (profile.score_rate if kind == "score" else profile.gather_rate)
    return took + (kernels * profile.get(f"{part}.call", default=0.0) if size or flops else 0.0)
