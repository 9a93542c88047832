"""The traffic of each system's decode step by an analytical rule, for sizes without a recorded run.

A rule gives bytes of one layer and the whole batch, by tier (`Traffic`); `modelled.py` schedules them. Pool size and
host/drive split come from the code of a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hillinfer.whatif import costs
from hillinfer.whatif.scenario import DoesNotFit, Scenario

# Measured on the embedded model (docs/experiments.md) and assumed for every model: the share of the attended tokens
# served by the drive, over the pool's share of all tokens.
POOL, MISSED = (0.0, 0.2, 0.4, 1.0), (1.0, 0.35, 0.25, 0.0)
LRU = 1.08  # misses of LRU relative to hit counters, same source: 36.2 to 33.4 %
CHUNK = 16  # tokens of a Quest page and of a LeoAM leaf
REDUNDANT = 1.2  # bytes of LeoAM's selected chunks relative to the selected tokens: assumed; fixed chunks have 1.4
INT4 = 0.28  # bytes of a record in INT4 with its scales, relative to FP16
WIDENED = 5  # bytes moved for one of an INT8 code on a GPU: read, halved and written as bf16, and read by the product
RECODED = 10  # and more to halve, round and write back where a scale doubled: estimated, in one layer of a token
RANKED = 100  # bytes moved for a score on a GPU until it is a rank: 13 passes of 4 to 12
LAUNCHES = 75  # kernels of a token's encoding, scores, ranks and choice, counted on the stand-in (tests/test_gpu.py)
PARTIAL = 0.25  # partial keys read to be scored ahead, share of the KV's bytes: 20 to 30 % (2602.18750)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one layer's step.

    attend        attended to on the model's device; `inside` in the drive; `near` in host memory, to which the query
                  goes with the new token
    stream        read from the drive independently of the selection, hence early; `mapped`: through the page cache
    resident      crosses the link independently of the selection
    keys          read from the drive to be scored on the host
    score         scored on the host; `device_score` on the model's device, by `kernels`
    dram, nand    scored in the drive, from its DRAM, its NAND
    fetched       read from the drive after selection, in pieces of `block`; `gather` from the host's pool
    lookahead     selected one layer ahead; `reselect`: and again with the true query, which fetches the misses
    """

    attend: float
    stream: float = 0
    mapped: bool = False
    resident: float = 0
    keys: float = 0
    score: float = 0
    device_score: float = 0
    kernels: int = 1
    dram: float = 0
    nand: float = 0
    fetched: float = 0
    block: float = math.inf
    gather: float = 0
    inside: float = 0
    near: float = 0
    lookahead: bool = False
    reselect: bool = False


def missed(pool: float) -> float:
    """Miss rate of the attended tokens in a pool that holds this share of all tokens."""
    return float(np.interp(pool, POOL, MISSED))


def _spilled(case: Scenario, need: float, what: str = "KV") -> float:
    """Share of `need` bytes, all layers, that must cross the link. DoesNotFit if memory is too small."""
    if need > (room := case.gpu_room + case.host_room):
        raise DoesNotFit(f"{need / 1e9:.1f} GB of {what} in {room / 1e9:.1f} GB of memory")
    return max(0.0, 1 - case.gpu_room / need) if case.profile.has("gpu") else 0.0


def full(case: Scenario) -> Traffic:
    return Traffic(case.layer, resident=case.layer * _spilled(case, case.kv))


def evicting(case: Scenario) -> Traffic:
    """Only what a step attends to is kept: sinks and window, heavy hitters, or one selection after the prompt."""
    return Traffic(case.selected, resident=case.selected * _spilled(case, case.selected * case.shape.layers))


def quest(case: Scenario) -> Traffic:
    return Traffic(case.selected, device_score=case.layer / CHUNK, gather=_spilled(case, case.kv) * case.selected)


def scored_there(case: Scenario) -> dict:
    """Key codes on the model's device."""
    ranked = RANKED * case.shape.heads * case.context * case.batch
    return dict(device_score=(WIDENED + RECODED / case.shape.layers) * case.codes + ranked, kernels=LAUNCHES)


def topk(case: Scenario) -> Traffic:
    crosses = _spilled(case, case.kv + case.codes * case.shape.layers, "KV and codes")
    if case.profile.has("gpu") and not crosses:
        return Traffic(case.selected, **scored_there(case))
    return Traffic(case.selected, score=case.codes, gather=(crosses or 1.0) * case.selected)


def flexgen(case: Scenario) -> Traffic:
    return Traffic(case.layer, stream=case.layer)


def flexgen_held(case: Scenario) -> Traffic:
    return Traffic(case.layer, stream=case.layer * (1 - case.held()), resident=case.layer * case.held())


def page_cache(case: Scenario) -> Traffic:
    """Cyclic reads of all layers through an LRU cache: all hits if everything fits, otherwise none."""
    hit = float(case.held() == 1)
    return Traffic(case.layer, stream=case.layer * (1 - hit), mapped=True, resident=case.layer * hit)


def scan(case: Scenario) -> Traffic:
    """Token-level selection over a plain drive: every key outside host memory is read to be scored."""
    held = case.held()
    fetched = missed(held) * case.selected
    return Traffic(
        case.selected, keys=(1 - held) * case.layer / 2, score=case.layer / 2,
        fetched=fetched, block=case.shape.record_bytes, gather=case.selected - fetched,
    )  # fmt: skip


def infinigen(case: Scenario) -> Traffic:
    """The same with partial keys, one layer ahead."""
    traffic = scan(case)
    return replace(traffic, keys=2 * PARTIAL * traffic.keys, score=2 * PARTIAL * traffic.score, lookahead=True)


def leoam(case: Scenario) -> Traffic:
    held = case.held()
    fetched = missed(held) * case.selected * REDUNDANT
    lane, weights = costs.lane_of(case.profile, "cpu", "dense"), case.shape.layer_weights
    how = dict(flops=2 * weights * case.batch, kernels=12)
    dense = costs.seconds(case.profile, lane, "dense", weights * case.shape.width, **how)
    compute = dense + 2 * case.selected / case.profile.get("gpu.bandwidth", default=1e12)
    rate = case.profile.get("drive.read", CHUNK * case.shape.record_bytes)
    ratio = min(1.0, max(INT4, compute * rate / max(fetched, 1)))  # compressed only while transfer is the longer
    abstracts = case.layer / CHUNK
    return Traffic(
        case.selected, keys=(1 - held) * abstracts, score=abstracts, fetched=fetched * ratio,
        block=CHUNK * case.shape.record_bytes, gather=(1 - missed(held)) * case.selected, lookahead=True,
    )  # fmt: skip


def hillinfer(case: Scenario) -> Traffic:
    """With a drive that scores, host and drive each score what they hold; otherwise the host scores all codes."""
    codes, pool = case.codes, case.pool()
    if case.profile.has("scorer"):
        cold = (1 - pool) * codes
        fits = min(1.0, case.profile.get("scorer.memory") / max(1, cold * case.shape.layers))
        scored = dict(score=pool * codes, dram=fits * cold, nand=(1 - fits) * cold)
    else:
        room = case.host_room - codes * case.shape.layers
        if room < 0:
            raise DoesNotFit(f"{codes * case.shape.layers / 1e9:.1f} GB of codes in {case.host_room / 1e9:.1f} GB")
        pool, scored = min(pool, room / case.kv), dict(score=codes)
    fetched = missed(pool) * case.selected
    moved = dict(fetched=fetched, gather=case.selected - fetched, block=case.shape.record_bytes)
    return Traffic(case.selected, **scored, **moved, lookahead=True, reselect=True)


def hillinfer_near_host(case: Scenario) -> Traffic:
    """As this project beside a GPU, without room there: the host scores, and attends to what it holds."""
    traffic = hillinfer(case)
    return replace(traffic, attend=0, near=traffic.attend, gather=0, lookahead=False, reselect=False)


def hillinfer_near(case: Scenario) -> Traffic:
    """The same with codes in GPU memory, if they fit."""
    fits = case.codes * case.shape.layers <= case.gpu_room
    return replace(hillinfer_near_host(case), **(dict(score=0) | scored_there(case) if fits else {}))


def hillinfer_paper(case: Scenario) -> Traffic:
    """As in the paper: the selection made one layer ahead is used, nothing is scored twice."""
    return replace(hillinfer(case), reselect=False)


def hillinfer_nand(case: Scenario) -> Traffic:
    """All codes on NAND, for a drive whose DRAM is only a buffer."""
    traffic = hillinfer_paper(case)
    return replace(traffic, dram=0, nand=traffic.dram + traffic.nand)


def lru(case: Scenario) -> Traffic:
    traffic = hillinfer(case)
    fetched = min(case.selected, LRU * traffic.fetched)
    return replace(traffic, fetched=fetched, gather=case.selected - fetched)


def instattention(case: Scenario) -> Traffic:
    if not case.profile.has("scorer"):
        raise DoesNotFit("no drive that computes")
    return Traffic(0, inside=case.layer)


RULES: dict[str, Callable[[Scenario], Traffic]] = {
    "full": full, "streaming": evicting, "h2o": evicting, "snapkv": evicting, "quest": quest, "topk": topk,
    "flexgen": flexgen, "flexgen-held": flexgen_held, "page-cache": page_cache, "dualblade": flexgen_held,
    "scan": scan, "infinigen": infinigen, "leoam": leoam, "instattention": instattention, "lru": lru,
    "hillinfer": hillinfer, "hillinfer-paper": hillinfer_paper, "hillinfer-nand": hillinfer_nand,
    "hillinfer-near": hillinfer_near, "hillinfer-near-host": hillinfer_near_host,
}  # fmt: skip
