"""What a decode step of each system moves and computes, by rule, where no run of it was recorded at that size.

A rule states bytes for one layer and the whole batch, by tier (`Work`); one schedule, that of `Layer`, runs them all.
The pool's size, the split and whether to look ahead are decided by the code that decides them in a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from hillinfer.config import Settings
from hillinfer.pipeline import costs
from hillinfer.pipeline.devices import Profile
from hillinfer.pipeline.engine import Task, play, schedule, step_seconds
from hillinfer.pipeline.lookahead import Trial
from hillinfer.pipeline.run import Run
from hillinfer.pipeline.shapes import ModelShape
from hillinfer.pipeline.timeline import Timeline
from hillinfer.tiers.geometry import Geometry

USABLE = 0.9  # share of GPU memory for weights and KV; of host memory, 0.8
# Measured on the embedded model (docs/experiments.md), and assumed for every model: the share of the attended tokens
# that the drive serves where the pool holds this share of all, and what lookahead brings.
POOL, MISSED = (0.0, 0.2, 0.4, 1.0), (1.0, 0.35, 0.25, 0.0)
LRU = 1.08  # lru's misses over those of hit counters, same place: 36.2 to 33.4 %
COVER = ACCURACY = 0.73
CHUNK = 16  # tokens of a Quest page and of a LeoAM leaf
REDUNDANT = 1.2  # bytes of LeoAM's chosen chunks over those of the tokens wanted: assumed, fixed chunks have 1.4
INT4 = 0.28  # bytes of a record in INT4 with its scales
PER_ROW = ("score", "select", "guess", "gather", "read", "prefetch")  # one call for each sequence of the batch
PARTIAL = 0.25  # partial keys that a prefetch-based system brings to score, of the KV's bytes: 20 to 30 % (2602.18750)


class DoesNotFit(ValueError):
    """The system cannot hold this case's KV on this profile."""


@dataclass(frozen=True)
class Case:
    """One cell: a model's decode step on a profile. `host` bytes of host memory may hold KV (M0); None: all there is.

    share  the host pool's share of the tokens, forced; None lets the system's own rule decide
    deep   whether records are read many at once; else one at a time
    """

    profile: Profile
    shape: ModelShape
    context: int
    batch: int = 1
    alpha: float = 0.2
    host: float | None = None
    share: float | None = None
    deep: bool = True
    split: str = "shortest"

    @property
    def kv(self) -> int:
        return self.shape.kv_bytes(self.context, self.batch)

    @property
    def layer(self) -> int:
        """KV bytes of one layer."""
        return self.kv // self.shape.layers

    @property
    def chosen(self) -> int:
        """KV bytes of one layer that a step attends to, by the settings' own rule."""
        return self.layer // self.context * Settings(alpha=self.alpha).budget(self.context)

    @property
    def codes(self) -> int:
        """INT8 key codes of one layer."""
        return self.context * self.batch * self.shape.code_bytes()

    @property
    def on_gpu(self) -> float:
        """Bytes of weights that the model's device holds; the rest streams over the link in each step."""
        return min(self.shape.weight_bytes, USABLE * self.profile.get("gpu.memory", default=math.inf))

    @property
    def gpu_room(self) -> float:
        """For KV, beside the weights."""
        return USABLE * self.profile.get("gpu.memory") - self.on_gpu if self.profile.has("gpu") else 0.0

    @property
    def host_room(self) -> float:
        """For KV and codes, beside the weights that are in host memory."""
        held = self.shape.weight_bytes - (self.on_gpu if self.profile.has("gpu") else 0)
        room = 0.8 * self.profile.get("cpu.memory") - held
        return max(0.0, room if self.host is None else min(self.host, room))

    def held(self) -> float:
        """Share of the KV that host memory can hold."""
        return min(1.0, self.host_room / self.kv)

    def pool(self) -> float:
        """The hot pool's share of the tokens, as `Run` decides it."""
        if self.share is not None:
            return self.share
        run = Run(Settings(alpha=self.alpha, host_budget=int(self.host_room), split=self.split), self.shape.layers)
        run.geometry = Geometry(
            self.batch, self.shape.kv_heads, self.shape.head_dim, torch.float16, torch.device("cpu")
        )
        if self.profile.has("scorer"):
            run.speeds = self.profile.speeds(self.shape.code_bytes(), self.shape.record_bytes)
        return run.pool_tokens(self.context) / self.context


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


class _Steps:
    """Builds the tasks of some decode steps of one case."""

    def __init__(self, case: Case, work: Work, system: str):
        self.case, self.work, self.system, self.tasks = case, work, system, []

    def do(self, lane: str, kind: str, size: float, after, layer: int, step: int, block=math.inf, **how) -> int | None:
        """Add a task unless there is nothing to do; returns what those that follow wait for."""
        after = tuple(sorted({index for index in after if index is not None}))
        if not size:
            return after[-1] if len(after) == 1 else self._join(after, layer, step)
        case, profile = self.case, self.case.profile
        moved = round(size)
        if kind in ("select", "guess") and profile.kinds:
            size = case.context  # that is what the measured cost of choosing grows with
        if kind in PER_ROW:
            how["calls"] = case.batch
        if kind in ("read", "prefetch") and not case.deep and profile.has("drive", "read_one"):
            took = size / profile.get("drive.read_one", block)
        else:
            took = costs.seconds(profile, lane, kind, size, block=block, system=self.system, **how)
        self.tasks.append(Task(lane, kind, layer, step, took, moved, after))
        return len(self.tasks) - 1

    def _join(self, after, layer: int, step: int) -> int | None:
        if not after:
            return None
        self.tasks.append(Task("cpu:join", "wait", layer, step, 0.0, 0, after))
        return len(self.tasks) - 1

    def select(self, kind: str, after, layer: int, step: int) -> int | None:
        """Score on every side at once, then choose."""
        w, case = self.work, self.case
        keys = self.do("drive", "read", w.keys, after, layer, step)
        host = self.do("cpu", "score", w.score, [keys, *after], layer, step)
        dram = self.do("drive:dram", "evaluate", w.dram, after, layer, step)
        nand = self.do("drive", "scan", w.nand, after, layer, step, block=1 << 20)
        device = self.do("gpu", "score", w.device, after, layer, step) if case.profile.has("gpu") else host
        if not case.profile.has("gpu") and w.device:
            device = self.do("cpu", "score", w.device, after, layer, step)
        any_scored = w.score or w.dram or w.nand or w.device
        size = 4 * case.context * case.batch * case.shape.kv_heads if any_scored else 0
        return self.do("cpu", kind, size, [host, dram, nand, device, *after], layer, step)

    def build(self, steps: int) -> list[Task]:
        case, w = self.case, self.work
        shape, profile = case.shape, case.profile
        device = costs.lane_of(profile, "cpu", "attend")
        missing = (shape.weight_bytes - case.on_gpu) / shape.layers if profile.has("gpu") else 0
        link = profile.has("gpu")
        new = case.batch * shape.record_bytes
        uses_drive = w.stream + w.keys + w.wanted + w.dram + w.nand + w.inside > 0
        attended: list[int | None] = [None, None]  # of the layers before, across steps
        for step in range(steps):
            for layer in range(shape.layers):
                early = [attended[-2]]  # what comes whatever is selected has room for one layer ahead
                weights = self.do("link", "weights", missing, early, layer, step)
                dense = self.do(device, "dense", shape.layer_weights * shape.width, [attended[-1], weights], layer,
                                step, flops=2 * shape.layer_weights * case.batch, kernels=12)  # fmt: skip
                ready = self.do("cpu", "append", new, [dense], layer, step)
                if uses_drive:  # many tokens are written at once: their latency is shared
                    self.do("drive", "write", new, [ready], layer, step, kernels=0)
                way = "mapped" if w.mapped and profile.has("drive", "mapped") else "read"
                streamed = self.do("drive", way, w.stream, early, layer, step)
                brought = w.stream + w.resident
                streamed = self.do("link", "transfer", brought * link, [streamed, *early], layer, step)
                attend = [ready, streamed]
                now = [ready]
                if w.ahead:
                    # the first layer of a step knows no input before the last step's token
                    guess = self.select("guess", early if layer else [attended[-1]], layer, step)
                    useful = w.wanted * (COVER if w.again else 1.0)
                    size = useful / ACCURACY if w.again else useful
                    ahead = self.do("drive", "prefetch", size, [guess], layer, step, block=w.block)
                    pooled = guess
                    if not w.again:
                        pooled = self.do("cpu", "gather", w.gather, [guess], layer, step)
                    sent = useful + (0 if w.again else w.gather)
                    attend.append(self.do("link", "transfer", sent * link, [ahead, pooled], layer, step))
                    rest, gather = (w.wanted - useful, w.gather) if w.again else (0, 0)
                    now.append(guess)
                else:
                    rest, gather = w.wanted, w.gather
                if w.again or not w.ahead:
                    chosen = self.select("select", now, layer, step)
                    read = self.do("drive", "read", rest, [chosen], layer, step, block=w.block)
                    pooled = self.do("cpu", "gather", gather, [chosen], layer, step)
                    attend += [chosen, self.do("link", "transfer", (rest + gather) * link, [read, pooled], layer, step)]
                    if not link:
                        attend += [read, pooled]
                inside = self.do("drive", "scan", w.inside, [ready], layer, step, block=1 << 20)
                flops = 4 * w.attend / shape.record_bytes * shape.heads * shape.head_dim
                done = self.do(device, "attend", w.attend, [*attend, inside], layer, step, flops=flops)
                attended.append(done)
            head = shape.head_weights * shape.width
            flops = 2 * shape.head_weights * case.batch
            attended.append(self.do(device, "head", head, [attended[-1]], shape.layers, step, flops=flops))
        return self.tasks


def model(case: Case, system: str, steps: int = 3) -> tuple[list[Task], Work]:
    """The tasks of some decode steps, looking ahead or not as a run would choose after trying both (`Trial`)."""
    work = RULES[system](case)
    if not work.again:
        return _Steps(case, work, system).build(steps), work
    built = {
        on: _Steps(case, own, system).build(steps)
        for on, own in ((True, work), (False, replace(work, ahead=False, again=False)))
    }
    took = {on: step_seconds(tasks, schedule(tasks, case.profile.capacity)) for on, tasks in built.items()}
    trial, now = Trial("auto"), 0.0
    while trial.times is not None:
        trial.step(now)
        now += took[trial.on]
    return built[trial.on], work if trial.on else replace(work, ahead=False, again=False)


def seconds(case: Case, system: str) -> float:
    """Modelled seconds of a decode step, once the pipeline is full. DoesNotFit where the system cannot run it."""
    tasks, _ = model(case, system)
    return step_seconds(tasks, schedule(tasks, case.profile.capacity))


def timeline(case: Case, system: str, steps: int = 3) -> Timeline:
    """The modelled steps as a timeline, for every plot and export."""
    about = {"system": system, "model": case.shape.name, "context": case.context, "batch": case.batch}
    about |= {"alpha": case.alpha, "profile": case.profile.name}
    tasks, _ = model(case, system, steps)
    return play(tasks, schedule(tasks, case.profile.capacity), f"modelled: {case.profile.name}", about)
