"""The simulated kernel equals the package's evaluator to the bit, for any memory behaviour."""

import functools

import numpy as np
import pytest
import torch

from fpga.sim import kernel as sim
from fpga.sim import twin
from fpga.sim.check import LEGAL, coverage, differences, random_case
from fpga.sim.kernel import Config, Image, Kernel

CONFIGS = [Config(8, 128), Config(4, 64), Config(8, 64), Config(4, 128)]
OTHERS = [Config(8, 128, lanes=16), Config(4, 64, lanes=32, group=2), Config(8, 64, group=8, nmax=4096)]
named = functools.partial(pytest.mark.parametrize, ids=lambda config: config.name)


@functools.cache
def opened(config: Config) -> Kernel:
    try:
        return Kernel(config)
    except sim.MissingTool as missing:
        pytest.skip(str(missing))


def run_cases(config: Config, count: int, seed: int) -> None:
    """One run after another on the same kernel, so that each starts from what the last one left."""
    kernel, rng = opened(config), np.random.default_rng(seed)
    for _ in range(count):
        image, memory = random_case(rng, config)
        kernel.memory(**memory)
        result, answers = sim.call(kernel, image)
        assert result.status == 0 and not differences(image, answers)


@named("config", CONFIGS[:2])
def test_random_cases_are_exact_and_reach_every_state(config):
    run_cases(config, 40, 1)
    refused(config)
    for machine, (unseen, illegal) in coverage(opened(config).transitions()).items():
        assert not unseen and not illegal, (machine, LEGAL[machine])


@pytest.mark.slow
@named("config", CONFIGS + OTHERS)
def test_many_random_cases_are_exact(config):
    run_cases(config, 200 if config in CONFIGS else 60, 2)


@pytest.mark.slow
@named("config", CONFIGS)
def test_the_capacity_can_be_used_up(config):
    """As many tokens as the score memory holds, in each kind of the hardest data: all equal, and few different."""
    from fpga.sim.check import codes_of

    kernel, rng, n = opened(config), np.random.default_rng(3), config.nmax
    for kind, k, mode in [("equal", 4096, sim.INDICES), ("ties", n, sim.INDICES), ("bell", 4096, sim.ALL)]:
        codes = codes_of(kind, rng, (2, n, config.head_dim), config.bits)
        query = codes_of("bell", rng, (2, config.group, config.head_dim), 8, query=True)
        kernel.memory()
        result, answers = sim.call(kernel, image := Image(config, codes, query, k, mode))
        assert result.status == 0 and not differences(image, answers)


def simple(config: Config, n: int = 100, **changes) -> Image:
    rng = np.random.default_rng(n)
    codes = rng.integers(-7, 8, (2, n, config.head_dim)).astype(np.int8)
    query = rng.integers(-7, 8, (2, config.group, config.head_dim)).astype(np.int8)
    return Image(config, codes, query, **({"k": 10} | changes))


def refused(config: Config) -> None:
    """What cannot be right, and memory that fails, end in a status word; the next run is right again."""
    kernel = opened(config)

    def call(arguments=(), skew=0, bad_write=None, **memory):
        """Status register, and the first header's status and count, of a run with arguments changed {place: value}."""
        image, place = simple(config), sim.Memory(kernel)
        given = list(image.arguments(place, skew))
        kernel.memory(max_cycles=100_000, bad_write=-1 if bad_write is None else given[2] + bad_write, **memory)
        for index, value in dict(arguments).items():
            given[index] = value
        status = kernel.run(*given).status
        place.clear()
        header = image.out[:16].view(np.uint32)
        kernel.memory()
        result, answers = sim.call(kernel, good := simple(config, 50))
        assert result.status == 0 and not differences(good, answers)
        return status, int(header[2]), int(header[0])

    blank = 0xEEEEEEEE
    assert call({4: config.nmax + 1}) == (sim.CAPACITY, sim.CAPACITY, 0)
    assert call({4: 1 << 31}) == (sim.CAPACITY, sim.CAPACITY, 0)
    assert call({7: 3}) == (sim.BAD_ARGUMENT, sim.BAD_ARGUMENT, 0)
    assert call({6: 0}) == (sim.BAD_ARGUMENT, sim.BAD_ARGUMENT, 0)
    assert call({6: 1 << 16}) == (sim.BAD_ARGUMENT, sim.BAD_ARGUMENT, 0)
    assert call({8: 4100}) == (sim.ALIGN, sim.ALIGN, 0)
    assert call(skew=8) == (sim.ALIGN, blank, blank)  # also of the output, which is left alone
    assert call({0: 1 << 50})[0] == sim.READ_ERROR
    assert call(bad_read=(1 << 32) + 64)[0] == sim.READ_ERROR
    assert call({2: 1 << 50}) == (sim.WRITE_ERROR, blank, blank)
    assert call(bad_write=64) == (sim.WRITE_ERROR, sim.WRITE_ERROR, 10)  # of the data: the header after it says so
    assert call(bad_write=0) == (sim.WRITE_ERROR, blank, blank)  # of the header: only the register can
    # Past the last mapped byte the memory answers with an error.
    assert call({3: 1 << 20})[0] in (sim.READ_ERROR, sim.READ_ERROR | sim.QUERY_RANGE)


def test_the_committed_table_is_of_this_kernel(tmp_path):
    """Cached results are those of the source as it is, and hold what the package draws from them."""
    from fpga.explore import EXPLORED, show, source
    from hillinfer.systems.hillinfer import cec
    from hillinfer.workbench.cec import (
        MEMORIES,
        cec_frame,
        overhead,
        pareto_figure,
        tokens_per_second,
        tools,
        utilisation,
    )

    assert tools()["kernel source"] == source(), "the kernel changed: make -C fpga table"
    names = set(cec_frame()["kernel"])
    assert {config.name for config in CONFIGS} <= names <= {config.name for config in EXPLORED}
    for row in cec.configurations():
        assert 0 <= overhead(row) < 0.1 and 0 < utilisation(row) < 1 and 0.5 < row.recall["0.1"] <= 1
    assert cec.choose(8, 16).name == "int8-d64-g4-l64" and cec.choose(4, 128).name == "int4-d128-g4-l64"
    slow, fast = (tokens_per_second(cec.choose(8, 128), MEMORIES[name]) for name in ("NAND", "DDR4 peak"))
    assert slow == 3.2e9 / 128 < fast
    assert len(pareto_figure().data) == 4
    page = show(tmp_path).read_text()
    assert all(name in page for name in names)


def test_the_emulated_drive_models_the_tables_kernel(tmp_path):
    """Scoring one token takes the kernel's time for a call, and the run names the parameter set."""
    from hillinfer.config import Settings
    from hillinfer.systems.hillinfer import cec
    from hillinfer.systems.hillinfer.run import ScoringRun
    from hillinfer.tiers.geometry import Geometry

    run = ScoringRun(Settings(drive=tmp_path, drive_kind="emulated", precision="int4"), 1)
    run.start(Geometry(1, 2, 64, torch.float32, torch.device("cpu")))
    drive, kernel = run.drive, cec.choose(4, 64)
    drive.write(0, 0, np.zeros((3000, 1024), np.uint8), np.zeros((2, 3000, 64), np.int8))
    modelled = []
    for cold in (np.arange(1), np.arange(3000)):
        drive.hold(0, cold, False)
        evaluation = drive.begin_evaluate(0, np.zeros((2, 4, 64), np.int8))
        list(evaluation)
        modelled.append(evaluation.work.modelled_s)
    assert kernel.call_seconds < modelled[0] < 1.1 * kernel.call_seconds
    assert modelled[1] > kernel.call_seconds + 2 * 3000 * 64 / kernel.code_rate(64)
    assert kernel.name in run.why_split() and "assumed" in run.why_split()
    run.stop()


def test_nothing_to_score_is_an_answer_too():
    """No tokens, none wanted, and more wanted than there are, in each mode."""
    kernel, config = opened(CONFIGS[0]), CONFIGS[0]
    kernel.memory(stall=100)
    for n, k in [(0, 5), (5, 0), (5, 9), (0, 0), (1, 1)]:
        for mode in (sim.INDICES, sim.PAIRS, sim.ALL):
            result, answers = sim.call(kernel, image := simple(config, n, k=k, mode=mode))
            assert result.status == 0 and not differences(image, answers)


def test_a_query_code_without_a_negative_is_reported():
    kernel, config = opened(CONFIGS[0]), CONFIGS[0]
    image = simple(config)
    image.query[1, 3, 77] = -128
    kernel.memory()
    result, answers = sim.call(kernel, image)
    assert result.status == sim.QUERY_RANGE and answers[1].status == sim.QUERY_RANGE


def test_a_memory_that_never_answers_is_seen_by_the_host():
    """AXI has no way to give up an address: the host's timeout is the guard, and a reset brings the kernel back."""
    kernel = opened(CONFIGS[0])
    kernel.memory(latency=1 << 24, max_cycles=20_000)
    assert sim.call(kernel, simple(CONFIGS[0]))[0].status == sim.HUNG
    run_cases(CONFIGS[0], 3, 4)


def test_it_starts_itself_again_when_asked_to():
    kernel, memory = opened(CONFIGS[0]), sim.Memory(opened(CONFIGS[0]))
    kernel.memory(max_cycles=200_000)
    image = simple(CONFIGS[0])
    arguments = image.arguments(memory)
    assert kernel.run(*arguments).status == 0
    image.out[: 2 * image.out_stride] = 0
    assert kernel.lib.cec_auto_restart(kernel.handle, 3) == 3
    memory.clear()
    assert not differences(image, image.answers())


@named("config", CONFIGS)
def test_the_hls_twin_answers_the_same(config):
    """Its C simulation against the package's evaluator, and so against the RTL; a header's words, too."""
    try:
        library = twin.build(config)
    except sim.MissingTool as missing:
        pytest.skip(str(missing))
    rng = np.random.default_rng(5)
    for _ in range(60):
        image, _ = random_case(rng, config, 4000)
        assert not differences(image, twin.call(library, image))
    assert twin.call(library, simple(config), n_tokens=config.nmax + 1)[0].status == sim.CAPACITY
    assert twin.call(library, simple(config), mode=3)[0].status == sim.BAD_ARGUMENT


def test_the_hls_twin_writes_what_the_kernel_writes():
    """All bytes of the answer but the header's cycles and the padding, on the same random images."""
    config, rng = CONFIGS[0], np.random.default_rng(6)
    kernel = opened(config)
    library = twin.build(config)
    for _ in range(10):
        image, memory = random_case(rng, config)
        kernel.memory(**memory)
        _, hardware = sim.call(kernel, image)
        software = twin.call(library, image)
        for a, b in zip(hardware, software, strict=True):
            assert np.array_equal(a.positions, b.positions) and (a.threshold, a.status) == (b.threshold, b.status)
            assert a.scores is None or np.array_equal(a.scores, b.scores)


@pytest.mark.parametrize("bits, config", [(8, CONFIGS[0]), (4, CONFIGS[1])], ids=["int8", "int4"])
def test_the_embedded_models_keys_are_scored_exactly(bits, config):
    """Keys and queries of every layer, as the package codes them, on a document of 4K tokens."""
    from fpga.sim.real import coded, real_states

    kernel = opened(config)
    kernel.memory(stall=30)
    for keys, query in real_states()[::3]:
        codes, folded = (part.numpy() for part in coded(keys, query, bits))
        wide = np.zeros((*codes.shape[:2], config.head_dim), np.int8)
        wide[..., : codes.shape[2]] = codes
        asked = np.zeros((len(codes), config.group, config.head_dim), np.int8)
        asked[..., : codes.shape[2]] = folded[:, np.arange(config.group) % folded.shape[1]]
        _, answers = sim.call(kernel, image := Image(config, wide, asked, codes.shape[1] // 10, sim.PAIRS))
        assert not differences(image, answers)


@pytest.mark.parametrize(
    "top, broken",
    [
        ("fifo_proof", ("push & ~count[LOG2]", "push")),
        ("hist_proof", ("last_at == at ? last : read", "0 ? last : read")),
    ],
)
def test_the_proofs_hold_and_can_fail(top, broken):
    """FIFO and histogram, bounded; a design that loses what comes to a full FIFO, or a count, fails them."""
    from fpga.formal.prove import prove

    try:
        assert prove(top)
    except sim.MissingTool as missing:
        pytest.skip(str(missing))
    assert not prove(top, broken)
