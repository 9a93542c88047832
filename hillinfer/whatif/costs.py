"""What one piece of work costs on a profile: its bytes over the rate of the part that does it."""

import math

from hillinfer.whatif.devices import Profile

MODEL = ("dense", "head", "attend")  # the model's own work, on its device: the GPU where there is one
SYNCED = ("wait",)  # no work of its own; what it waits for is a dependency
OVERHEAD = ("other", "view")  # of this project's own code: known only where it was measured
RATES = {
    "transfer": "link.to_gpu",
    "weights": "link.to_gpu",
    "store": "link.from_gpu",
    "read": "drive.read",
    "prefetch": "drive.read",
    "mapped": "drive.mapped",
    "write": "drive.write",
    "evaluate": "scorer.dram_read",
    "scan": "scorer.nand_read",
    "inside": "scorer.nand_read",
}


def lane_of(profile: Profile, lane: str, kind: str) -> str:
    """Where a recorded kind of work would be done on this machine."""
    if kind in MODEL and lane in ("cpu", "gpu"):
        return "gpu" if profile.has("gpu") else "cpu"
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
    """Modelled seconds. `size` in bytes (`recording.size_of`), `block` the size of one piece.

    calls    how often the kind is done, for a measured cost
    kernels  how often the part's latency is paid, elsewhere

    Where the profile was measured with this project's code, its own cost of that kind (and system) counts; elsewhere
    the part's rate, a call's latency, and for the model's work the longer of reading and computing.
    """
    if kind in SYNCED:
        return 0.0
    for name in (f"{system}.{kind}", kind):
        if name in profile.kinds:
            return profile.kinds[name].at(size, calls)
    if kind in OVERHEAD:
        return 0.0
    part = lane.partition(":")[0]
    latency = kernels * profile.get(f"{part}.call", default=0.0) if size or flops else 0.0
    if part == "gpu" or (kind in MODEL and part == "cpu"):
        work = max(size / profile.get(f"{part}.bandwidth"), flops / profile.get(f"{part}.flops"))
    elif kind == "gather" and not profile.has("gpu"):
        work = 0.0  # attended to where it lies: no byte moves
    elif kind in RATES:
        work = size / profile.get(RATES[kind], block)
    elif part in ("drive", "link"):  # what a drive or a link does otherwise: it moves the bytes
        work = size / profile.get("drive.read" if part == "drive" else "link.to_gpu", block)
    elif kind == "score":
        work = size / profile.score_rate
    else:
        work = size / profile.gather_rate
    return work + latency
