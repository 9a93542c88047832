"""Test cases for the kernel, and its golden model, the package's evaluator."""

import numpy as np

from fpga.sim.kernel import ALL, INDICES, PAIRS, Answer, Config, Image
from hillinfer.evaluator.codes import TOP, head_scores_reference
from hillinfer.evaluator.topk import topk

KINDS = ("uniform", "bell", "equal", "extreme", "ties", "skewed")
# What the state machines may do; a state's staying where it is left out.
LEGAL = {
    "kernel": "IDLE-CHECK CHECK-START CHECK-DONE START-RUN RUN-DONE DONE-IDLE",
    "reader": "IDLE-QUERY QUERY-WAIT WAIT-KEYS KEYS-DRAINING DRAINING-QUERY DRAINING-IDLE",
    "topk": "CLEAR-IDLE IDLE-WALK1 IDLE-FINISH WALK1-REFINE WALK1-EMIT REFINE-WALK2 WALK2-EMIT EMIT-FINISH FINISH-IDLE",
    "writer": "IDLE-NEXT NEXT-IDLE IDLE-SIZE SIZE-DATA DATA-ADDRESS ADDRESS-IDLE IDLE-HEADER HEADER-HEADER_DATA "
    "HEADER_DATA-RESPONSE RESPONSE-NEXT",
}


def golden(image: Image) -> list[Answer]:
    """The expected answer of the kernel."""
    part = image.codes[:, image.first : image.first + image.n]
    answers = []
    by_head = head_scores_reference(image.query, part).reshape(*image.query.shape[:2], -1)
    for scores in by_head.max(1):  # the kernel sends the best of a group
        k = len(scores) if image.mode == ALL else min(image.k, len(scores))
        best = topk(scores, k)
        chosen = np.sort(best)
        threshold = int(scores[best[-1]]) if image.mode != ALL and k else None
        answers.append(Answer(chosen + image.first, scores[chosen], threshold, 0))
    return answers


def differences(image: Image, answers: list[Answer]) -> list[str]:
    """Differences between the answers and the golden model, compared bit by bit."""
    out = []
    for head, (want, have) in enumerate(zip(golden(image), answers, strict=True)):
        where = f"head {head} of n={image.n} k={image.k} mode={image.mode}"
        if not np.array_equal(want.positions, have.positions):
            out.append(f"{where}: other positions")
        if have.scores is not None and not np.array_equal(want.scores, have.scores):
            out.append(f"{where}: other scores")
        if have.status != want.status or (want.threshold is not None and have.threshold != want.threshold):
            out.append(f"{where}: status {have.status}, threshold {have.threshold}, not {want.threshold}")
    return out


def codes_of(kind: str, rng: np.random.Generator, size: tuple, bits: int, query: bool = False) -> np.ndarray:
    """Random codes of one kind: int8 with this many bits. Keys include the most negative code, queries do not."""
    top = TOP[bits]
    low = -top if query else -top - 1
    if kind == "uniform":
        return rng.integers(low, top + 1, size).astype(np.int8)
    if kind == "equal":
        return np.full(size, rng.integers(low, top + 1), np.int8)
    if kind == "extreme":
        return rng.choice([low, top], size).astype(np.int8)
    if kind == "ties":
        return (rng.integers(0, 2, size) * (np.arange(size[-1]) < 3)).astype(np.int8)
    wide = rng.standard_normal(size) * (top / 3)
    if kind == "skewed":
        wide = wide / 8 + top / 2 * (np.arange(size[-1]) == 1)
    return np.clip(np.rint(wide), low, top).astype(np.int8)


def random_case(rng: np.random.Generator, config: Config, most: int = 1500) -> tuple[Image, dict]:
    """A random case, with the behaviour of the memory."""
    n = int(rng.choice([0, 1, 2, 3, 5, 6, 7, 8, 9, int(2 ** rng.uniform(3, np.log2(most)))], p=[0.02] * 9 + [0.82]))
    k = int(
        rng.choice([0, 1, n, n + 5, int(rng.integers(0, n + 1)), max(1, n // 10)], p=[0.02, 0.08, 0.1, 0.1, 0.4, 0.3])
    )
    heads, mode = int(rng.integers(1, 4)), int(rng.choice([INDICES, PAIRS, ALL], p=[0.6, 0.2, 0.2]))
    per_beat = max(1, config.lanes // config.token_bytes)
    first = int(rng.choice([0, per_beat * rng.integers(0, 50)])) if n else 0
    kinds = rng.choice(KINDS, 2)
    codes = codes_of(kinds[0], rng, (heads, first + n, config.head_dim), config.bits)
    query = codes_of(kinds[1], rng, (heads, config.group, config.head_dim), 8, query=True)
    memory = dict(
        latency=int(rng.integers(1, 200)),
        jitter=int(rng.choice([0, 100])),
        rate=float(rng.choice([config.lanes, config.lanes * 0.75, rng.uniform(2, config.lanes)])),
        stall=int(rng.choice([0, rng.integers(1, 220)])),
        seed=int(rng.integers(1 << 30)),
        max_cycles=1 << 22,
    )
    return Image(config, codes, query, k, mode, first, n), memory


def coverage(transitions: dict) -> dict[str, tuple[set[str], set[str]]]:
    """Per state machine: legal transitions that were not observed, and observed transitions that are illegal."""
    out = {}
    for machine, counts in transitions.items():
        seen = {f"{a}-{b}" for (a, b), count in counts.items() if count and a != b}
        legal = set(LEGAL[machine].split())
        out[machine] = legal - seen, seen - legal
    return out
