"""What a decode step of each system moves and computes, by rule, where no run of it was recorded at that size.

A rule states bytes for one layer and the whole batch, by tier (`Work`); `modelled.py` schedules them. The pool's size
and the split are decided by the code that decides them in a run (`Run.pool_tokens`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hillinfer.whatif import costs
from hillinfer.whatif.case import Case, DoesNotFit

# Measured on the embedded model (docs/experiments.md), and assumed for every model: the share of the attended tokens
# that the drive serves where the pool holds this share of all.
POOL, MISSED = (0.0, 0.2, 0.4, 1.0), (1.0, 0.35, 0.25, 0.0)
LRU = 1.08  # lru's misses over those of hit counters, same place: 36.2 to 33.4 %
CHUNK = 16  # tokens of a Quest page and of a LeoAM leaf
REDUNDANT = 1.2  # bytes of LeoAM's chosen chunks over those of the tokens wanted: assumed, fixed chunks have 1.4
INT4 = 0.28  # bytes of a record in INT4 with its scales
PARTIAL = 0.25  # partial keys that a prefetch-based system brings to score, of the KV's bytes: 20 to 30 % (2602.18750)


@dataclass(frozen=True)
class Work:
    """Bytes of one layer's step.

    stream      read from the drive whatever is selected, so it can come early; `mapped` through the page cache
    resident    crosses the link whatever is selected
    keys        read from the drive to be scored on the host, in pieces of `piece`
    score       scored on the host; `device` on the model's device
    dram, nand  scored in the drive, out of its DRAM, its NAND
    wanted      read from the drive once selected, in pieces of `block`; `gather` from the host's pool
    attend      attended to on the model's device; `inside` in the drive
    ahead       selected one layer ahead; `again`: and once more with the true query, which fetches what was missed
    """

    attend: float
    stream: float = 0
    mapped: bool = False
    resident: float = 0
    keys: float = 0
    score: float = 0
    device: float = 0
    dram: float = 0
    nand: float = 0
    wanted: float = 0
    block: float = math.inf
    gather: float = 0
    inside: float = 0
    ahead: bool = False
    again: bool = False


def missed(pool: float) -> float:
    """Share of the attended tokens that a pool of this share of all tokens does not hold."""
    return float(np.interp(pool, POOL, MISSED))


def _in_memory(case: Case, need: float, what: str = "KV") -> float:
    """Share of `need` bytes, all layers, that must cross the link. DoesNotFit where memory is too small."""
    if need > case.gpu_room + case.host_room:
        room = (case.gpu_room + case.host_room) / 1e9
        raise DoesNotFit(f"{need / 1e9:.1f} GB of {what} in {room:.1f} GB of memory")
    return max(0.0, 1 - case.gpu_room / need) if case.profile.has("gpu") else 0.0


def full(case: Case) -> Work:
    return Work(case.layer, resident=case.layer * _in_memory(case, case.kv))


def kept(case: Case) -> Work:
    """A step's tokens are all that is kept: sinks and window, heavy hitters, or one choice after the prompt."""
    return Work(case.chosen, resident=case.chosen * _in_memory(case, case.chosen * case.shape.layers))


def quest(case: Case) -> Work:
    crosses = _in_memory(case, case.kv)
    return Work(case.chosen, device=case.layer / CHUNK, gather=crosses * case.chosen)


def topk(case: Case) -> Work:
    crosses = _in_memory(case, case.kv + case.codes * case.shape.layers, "KV and codes")
    return Work(case.chosen, score=case.codes, gather=(crosses if case.profile.has("gpu") else 1.0) * case.chosen)


def flexgen(case: Case) -> Work:
    return Work(case.layer, stream=case.layer)


def flexgen_held(case: Case) -> Work:
    return Work(case.layer, stream=case.layer * (1 - case.held()), resident=case.layer * case.held())


def page_cache(case: Case) -> Work:
    """Reading all layers in turn through an LRU cache: what does not fit as a whole is gone when its turn comes."""
    hit = float(case.held() == 1)
    return Work(case.layer, stream=case.layer * (1 - hit), mapped=True, resident=case.layer * hit)


def scan(case: Case) -> Work:
    """Token-level selection over a plain drive: every key that host memory lacks is read to be scored."""
    held = case.held()
    want = missed(held) * case.chosen
    return Work(
        case.chosen, keys=(1 - held) * case.layer / 2, score=case.layer / 2,
        wanted=want, block=case.shape.record_bytes, gather=case.chosen - want,
    )  # fmt: skip


def infinigen(case: Case) -> Work:
    """The same with partial keys, one layer ahead."""
    part = 2 * PARTIAL
    work = scan(case)
    return replace(work, keys=part * work.keys, score=part * work.score, ahead=True)


def leoam(case: Case) -> Work:
    held = case.held()
    want = missed(held) * case.chosen * REDUNDANT
    compute = _dense_seconds(case) + 2 * case.chosen / case.profile.get("gpu.bandwidth", default=1e12)
    rate = case.profile.get("drive.read", CHUNK * case.shape.record_bytes)
    squeeze = min(1.0, max(INT4, compute * rate / max(want, 1)))  # compressed only as far as transfer is longer
    abstracts = case.layer / CHUNK
    return Work(
        case.chosen, keys=(1 - held) * abstracts, score=abstracts, wanted=want * squeeze,
        block=CHUNK * case.shape.record_bytes, gather=(1 - missed(held)) * case.chosen, ahead=True,
    )  # fmt: skip


def hillinfer(case: Case) -> Work:
    """With a drive that scores, host and drive score what they hold; else the host scores codes of every key."""
    codes, pool = case.codes, case.pool()
    if case.profile.has("scorer"):
        cold = (1 - pool) * codes
        fits = min(1.0, case.profile.get("scorer.memory") / max(1, cold * case.shape.layers))
        own = dict(score=pool * codes, dram=fits * cold, nand=(1 - fits) * cold)
    else:
        room = case.host_room - codes * case.shape.layers
        if room < 0:
            raise DoesNotFit(f"{codes * case.shape.layers / 1e9:.1f} GB of codes in {case.host_room / 1e9:.1f} GB")
        pool, own = min(pool, room / case.kv), dict(score=codes)
    want = missed(pool) * case.chosen
    own |= dict(wanted=want, gather=case.chosen - want, block=case.shape.record_bytes)
    return Work(case.chosen, **own, ahead=True, again=True)


def hillinfer_paper(case: Case) -> Work:
    """As the paper draws it: what was selected one layer ahead is used, nothing is scored twice."""
    return replace(hillinfer(case), again=False)


def hillinfer_nand(case: Case) -> Work:
    """Codes on the NAND alone, as where the drive's DRAM only buffers it."""
    work = hillinfer_paper(case)
    return replace(work, dram=0, nand=work.dram + work.nand)


def lru(case: Case) -> Work:
    work = hillinfer(case)
    want = min(case.chosen, LRU * work.wanted)
    return replace(work, wanted=want, gather=case.chosen - want)


def instattention(case: Case) -> Work:
    if not case.profile.has("scorer"):
        raise DoesNotFit("no drive that computes")
    return Work(0, inside=case.layer)


RULES: dict[str, Callable[[Case], Work]] = {
    "full": full, "streaming": kept, "h2o": kept, "snapkv": kept, "quest": quest, "topk": topk,
    "flexgen": flexgen, "flexgen-held": flexgen_held, "page-cache": page_cache, "dualblade": flexgen_held,
    "scan": scan, "infinigen": infinigen, "leoam": leoam, "instattention": instattention, "lru": lru,
    "hillinfer": hillinfer, "hillinfer-paper": hillinfer_paper, "hillinfer-nand": hillinfer_nand,
}  # fmt: skip


def _dense_seconds(case: Case) -> float:
    lane = costs.lane_of(case.profile, "cpu", "dense")
    size = case.shape.layer_weights * case.shape.width
    return costs.seconds(case.profile, lane, "dense", size, flops=2 * case.shape.layer_weights * case.batch, kernels=12)
