"""Each kernel against its plain reference, on every instruction set of this machine: integers exact, floats bounded."""

import errno
import gc
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hillinfer import native
from hillinfer.evaluator.codes import TOP, KeyCodes, fold, head_scores_reference, pack
from hillinfer.evaluator.ranks import head_ranks_reference
from hillinfer.evaluator.segments import SEGMENT, segment_scores_torch
from hillinfer.evaluator.topk import topk_reference
from hillinfer.growable import aligned
from hillinfer.layer import NEVER
from hillinfer.native import build as builder
from hillinfer.native import fence, ring
from hillinfer.native.ring import Namespace, Rings
from hillinfer.systems.boxes import bounds
from hillinfer.tiers.checksums import BLOCK, Checksums

if os.environ.get(builder.SANITIZE) == "1":
    assert native.available(), native.why_not()  # a checked run without what it checks would pass
pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.why_not()}")
EACH = dict(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=native.isas() or ["none"])
def isa(request):
    before = native.library.isa
    native.library.isa = native.ISAS.index(request.param)
    yield request.param
    native.library.isa = before


@given(
    bits=st.sampled_from([8, 4]),
    group=st.integers(1, 9),
    dim=st.sampled_from([2, 16, 30, 64, 96, 128, 200, 256, 1040]),
    n=st.integers(0, 70),
    extreme=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(**EACH)
def test_scores(isa, bits, group, dim, n, extreme, threads, seed):
    rng, top = np.random.default_rng(seed), TOP[bits]

    def draw(top, *shape):
        return rng.choice(np.array([-top, top]) if extreme else np.arange(-top, top + 1), shape).astype(np.int8)

    query, codes = draw(TOP[8], 3, group, dim), draw(top, 3, n + 5, dim)
    stored = pack(torch.from_numpy(codes), bits)[:, :n]  # heads are further apart than n rows
    native_threads, native.SPLIT = native.SPLIT, 64
    try:
        got = native.score(query, stored, bits, threads=threads)
        rows = np.flatnonzero(rng.random(n) < 0.4)
        some = native.score(torch.from_numpy(query), stored, bits, rows, threads)
    finally:
        native.SPLIT = native_threads
    want = head_scores_reference(query, codes[:, :n])
    assert got.dtype == np.int32 and np.array_equal(got, want) and np.array_equal(some, want[:, rows])


@given(
    group=st.integers(1, 9),
    dim=st.sampled_from([2, 16, 30, 64, 128, 1040]),
    segments=st.integers(0, 5),
    extreme=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(**EACH)
def test_scan(isa, group, dim, segments, extreme, threads, seed):
    rng, n = np.random.default_rng(seed), segments * SEGMENT

    def draw(*shape):
        return torch.from_numpy(
            (rng.choice([-127, 127], shape) if extreme else rng.integers(-127, 128, shape)).astype(np.int8)
        )

    query, ranges = draw(3, group, dim), draw(3, segments + 1, 2, dim).sort(2).values[:, :segments]
    stored = (draw(3, n + 7, -(-dim // 16) * 4) | (-1 if extreme else 0))[:, :n]  # heads are further apart than n rows
    out, native_split, native.SPLIT = np.zeros((3 * group, n + 5), np.int32), native.SPLIT, 64
    try:
        native.scan(query, stored, ranges, SEGMENT, out, threads)
    finally:
        native.SPLIT = native_split
    assert np.array_equal(out[:, :n], segment_scores_torch(query, stored, ranges)) and not out[:, n:].any()


@given(
    heads=st.integers(1, 5),
    n=st.integers(1, 3000),
    spread=st.sampled_from([0, 3, 10**4, 2**22]),
    unit=st.floats(0, 1e5),
    threads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(**EACH)
def test_ranks(isa, heads, n, spread, unit, threads, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-spread, spread + 1, (heads, n)).astype(np.int32)
    scores[rng.random((heads, n)) < 0.1] = NEVER
    steps = (unit * rng.random(heads)).astype(np.float32)
    native_split, native.SPLIT = native.SPLIT, 64
    try:
        got = native.head_ranks(scores, steps, threads)
    finally:
        native.SPLIT = native_split
    assert np.array_equal(got, head_ranks_reference(torch.from_numpy(scores), torch.from_numpy(steps)))


F32, I8, I64 = torch.ones(2, 1, 16), np.zeros((2, 10, 16), np.int8), np.zeros(2, np.int64)
QUERY, KEYS, SCORES, ROOM = I8[:, :1].copy(), torch.ones(1, 2, 3, 16), np.zeros((2, 9), np.int32), torch.zeros(4, 8)
UNIT = np.ones(2, np.float32)
RECORDS = torch.ones(2, 2, 1, 16)  # K and V of one head
AT = RECORDS.data_ptr() + np.arange(2) * 128
BLOCKS, READ_ONLY = aligned(2 * BLOCK), np.zeros(2, np.uint32)
READ_ONLY.setflags(write=False)


def score(query=QUERY, stored=I8, bits=8, positions=None, threads=1):
    return native.score(query, stored, bits, positions, threads)


def attend(query=F32, rows=(AT, AT), dtype="float32", kv_heads=1, out=None, lse=None, side=None):
    out, lse = torch.empty(2, 1, 16) if out is None else out, torch.empty(2, 1) if lse is None else lse
    return native.attend(query, rows, dtype, kv_heads, 1.0, out, lse, side=side)


def judge(query=F32, boxes=AT, scales=AT, leaf=I64 > 0):
    return native.bounds(query, boxes, scales, leaf, 0.5)


def copy(addresses=AT, out=ROOM, slots=(0, 1)):
    return native.copy(addresses, out, slots)


def encode(keys=KEYS, bits=8, scale=None, codes=None, at=0, zero=None):
    scale = torch.ones(1, 2, 1, 16) if scale is None else scale
    zero = torch.ones(1, 2, 1, 16) if zero is None else zero
    codes = torch.zeros(1, 2, 9, 16, dtype=torch.int8) if codes is None else codes
    return native.encode(keys, bits, scale, zero, codes, at)


def quantise(query=F32, scale=F32, out=None):
    return native.quantise_query(query, scale, torch.empty(2, 1, 16, dtype=torch.int8) if out is None else out)


def scan(query=QUERY, stored=None, ranges=None, tokens=64, out=None):
    stored = torch.zeros(2, 128, 4, dtype=torch.int8) if stored is None else stored
    ranges = torch.zeros(2, 2, 2, 16, dtype=torch.int8) if ranges is None else ranges
    return native.scan(query, stored, ranges, tokens, np.zeros((2, 128), np.int32) if out is None else out)


def checksums(offset=0, address=BLOCKS.ctypes.data, length=BLOCK, sums=None, write=True):
    return native.checksums(write, [offset], [address], [length], np.zeros(2, np.uint32) if sums is None else sums)


WRONG = [
    (score, ValueError, dict(stored=I8[:, ::2]), dict(stored=I8[:1]), dict(bits=4), dict(bits=3)),
    (score, ValueError, dict(stored=I8.astype(np.int16)), dict(query=QUERY[:, :, ::2])),
    (score, ValueError, dict(stored=torch.empty(2, 10, 16, dtype=torch.int8, device="meta"))),
    (score, TypeError, dict(query=F32), dict(positions=[0.5]), dict(positions=np.ones(10, bool)), dict(threads="2")),
    (score, IndexError, dict(positions=[-1]), dict(positions=[3, 10])),
    (score, ValueError, dict(positions=[[1]])),
    (native.topk, TypeError, dict(scores=SCORES[0].astype(float), k=1), dict(scores=SCORES[0], k=1.5)),
    (native.topk, ValueError, dict(scores=SCORES, k=1), dict(scores=SCORES[0], k=-1)),
    (native.head_ranks, TypeError, dict(scores=SCORES.astype(np.int64), steps=UNIT), dict(scores=SCORES, steps=I64)),
    (native.head_ranks, ValueError, dict(scores=SCORES[:0], steps=UNIT[:0]), dict(scores=SCORES, steps=UNIT[:1])),
    (attend, ValueError, dict(rows=[AT]), dict(rows=[AT] * 3), dict(kv_heads=0), dict(kv_heads=3), dict(dtype="int8")),
    (attend, ValueError, dict(out=torch.empty(2, 1, 15)), dict(lse=torch.empty(1, 1)), dict(rows=[AT[::-1], AT])),
    (attend, ValueError, dict(query=torch.ones(2, 1, native.MAX_DIM + 1)), dict(query=F32.expand(2, 3, 16))),
    (attend, TypeError, dict(query=F32.double()), dict(out=I8), dict(rows=[[1, 2], AT])),
    (attend, TypeError, dict(rows=[AT.astype(float), AT])),
    (attend, IndexError, dict(rows=[I64, AT]), dict(rows=[AT + 1, AT]), dict(rows=[AT, (0, 128, 2)]), dict(side=3)),
    (attend, IndexError, dict(rows=[AT, (int(AT[0]), 127, 2)]), dict(rows=[AT, (int(AT[0]), 128, -1)])),
    (judge, TypeError, dict(query=F32.half()), dict(boxes=AT.astype(float)), dict(leaf=I64)),
    (judge, ValueError, dict(scales=AT[:1]), dict(leaf=I64[:1] > 0), dict(query=F32[:0])),
    (judge, IndexError, dict(boxes=I64), dict(scales=I64), dict(scales=AT + 2)),
    (copy, IndexError, dict(slots=[0, 4]), dict(slots=[-1, 0]), dict(slots=[1, 1]), dict(addresses=I64)),
    (copy, ValueError, dict(slots=[0]), dict(out=ROOM.T), dict(out=ROOM.to("meta"))),
    (copy, TypeError, dict(slots=[0.0, 1.0]), dict(addresses=AT.astype(float))),
    (encode, ValueError, dict(keys=KEYS.half()), dict(keys=KEYS[:, :, :, ::2]), dict(bits=4), dict(keys=KEYS[0])),
    (encode, ValueError, dict(scale=torch.ones(1, 2, 1, 15)), dict(zero=F32[:1])),
    (encode, ValueError, dict(codes=torch.zeros(1, 2, 9, 15, dtype=torch.int8))),
    (encode, ValueError, dict(keys=torch.ones(1, 1, 1, fence.MAX_CODED + 8)), dict(keys=KEYS.to("meta"))),
    (encode, TypeError, dict(scale=torch.ones(1, 2, 1, 16, dtype=torch.float64))),
    (encode, IndexError, dict(at=-1), dict(at=7)),
    (quantise, ValueError, dict(query=F32[:, :, :8]), dict(scale=F32[:1])),
    (quantise, ValueError, dict(out=torch.empty(2, 1, 32, dtype=torch.int8)[:, :, ::2])),
    (quantise, TypeError, dict(query=F32.bfloat16()), dict(out=F32.clone())),
    (scan, ValueError, dict(tokens=32), dict(tokens=128), dict(stored=torch.zeros(2, 128, 8, dtype=torch.int8))),
    (scan, ValueError, dict(ranges=torch.zeros(2, 1, 2, 16, dtype=torch.int8)), dict(out=np.zeros((2, 127), np.int32))),
    (scan, ValueError, dict(out=np.zeros((3, 128), np.int32)), dict(query=I8[:, ::5])),
    (scan, TypeError, dict(query=F32), dict(out=np.zeros((2, 128), np.float32))),
    (checksums, ValueError, dict(offset=-BLOCK), dict(offset=2 * BLOCK), dict(offset=1), dict(address=0)),
    (checksums, ValueError, dict(length=BLOCK - 1), dict(length=3 * BLOCK), dict(length=2**62)),
    (checksums, ValueError, dict(sums=READ_ONLY)),
    (checksums, TypeError, dict(sums=np.zeros(2, np.int64)), dict(offset=0.5)),
    (native.read, TypeError, dict(words=I64)),
    (native.read, ValueError, dict(words=np.zeros(4, np.uint64)[::2])),
    (native.read, ValueError, dict(words=np.zeros(17, np.uint8)[1:].view(np.uint64))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "given"),
    [pytest.param(call, error, given, id=f"{call.__name__}-{error.__name__}-{next(iter(given))}{i}{j}")
     for i, (call, error, *cases) in enumerate(WRONG) for j, given in enumerate(cases)],
)  # fmt: skip
def test_a_wrong_call_is_an_error(call, error, given):
    with pytest.raises(error):
        call(**given)


@pytest.mark.parametrize("call", [score, attend, judge, copy, encode, quantise, scan, checksums])
def test_the_right_call_is_none(call):
    call()


@given(
    n=st.integers(1, 400),
    share=st.floats(0, 1),
    spread=st.sampled_from([1, 5, 3000, 10**6, 2**31 - 1]),
    padded=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(**EACH)
def test_selection(isa, n, share, spread, padded, seed):
    rng, k = np.random.default_rng(seed), int(share * n)
    scores = rng.integers(-spread, spread, n, endpoint=True).astype(np.int32)
    if padded:
        scores[rng.random(n) < 0.2] = np.iinfo(np.int32).min + 1
    assert np.array_equal(native.topk(scores, k), topk_reference(torch.from_numpy(scores), k))


def test_selection_from_many_tokens():
    """Long enough that bins are narrowed more than once, with an outlier that spoils the first ones."""
    scores = np.random.default_rng(0).normal(0, 1000, 20_000).astype(np.int32)
    scores[5], scores[7] = 2**31 - 1, 1 - 2**31
    for k in (1, 100, 2000, 19_999, 20_000):
        assert np.array_equal(native.topk(scores, k), topk_reference(torch.from_numpy(scores), k))


@given(
    group=st.integers(1, 5),
    dim=st.sampled_from([2, 30, 64, 96, 128]),
    m=st.integers(0, 60),
    slack=st.sampled_from([0.0, 0.5, 1.0]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(**EACH)
def test_bounds(isa, group, dim, m, slack, threads, seed):
    torch.manual_seed(seed)
    pages, nodes, heads = 3, 5, 2
    codes = torch.randint(-127, 128, (pages, nodes, heads, 2, dim), dtype=torch.int8)
    scales, query = torch.rand(pages, heads, dim) + 0.01, torch.randn(heads, group, dim)
    page, node = torch.randint(0, pages, (m,)), torch.randint(0, nodes, (m,))
    leaf, width = np.random.default_rng(seed).random(m) < 0.5, heads * dim
    at = codes.data_ptr() + (page * nodes + node).numpy() * 2 * width
    scale_at = scales.data_ptr() + page.numpy() * 4 * width
    boxes = codes[page, node] * scales[page][:, :, None]
    want = bounds(boxes, query)
    want[:, leaf] = bounds(boxes[leaf], query, slack)
    split, native.SPLIT = native.SPLIT, 64
    try:
        got, alone = (native.bounds(query, at, scale_at, leaf, slack, count) for count in (threads, 1))
    finally:
        native.SPLIT = split
    size = (boxes.abs().amax(2) @ query.abs().transpose(1, 2).mean(0)).amax() if m else 1  # of what is summed
    assert np.allclose(got, want.transpose(1, 2).flatten(0, 1), atol=1e-5 * float(size) * dim**0.5)
    assert np.array_equal(alone, got)  # however many threads


@pytest.mark.parametrize("threads", [1, 3])
def test_copied_records(threads, monkeypatch):
    monkeypatch.setattr(native, "SPLIT", 64)
    torch.manual_seed(0)
    records, out = torch.randn(50, 2, 3, 10), torch.zeros(80, 2, 3, 10)
    index, slots = np.random.default_rng(0).permutation(50)[:33], np.random.default_rng(1).permutation(80)[:33]
    want = out.clone()
    want[torch.from_numpy(slots)] = records[torch.from_numpy(index)]
    native.copy(records.data_ptr() + index * 240, out, slots, threads)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(2, 4, 64), (1, 1, 80), (3, 7, 128), (2, 2, 20)])
def test_attention_over_scattered_records(isa, dtype, kv_heads, group, dim):
    torch.manual_seed(0)
    records = torch.randn(500, 2, kv_heads, dim).to(dtype)
    query = torch.randn(kv_heads * group, dim)
    for n in (1, 3, 32, 77, 500):
        positions = torch.randperm(500)[:n]
        kv = records[positions].double()
        for scale in (dim**-0.5, 3.0):  # the second makes a sharp softmax
            logits = torch.einsum("hgd,nhd->hgn", query.double().view(kv_heads, group, dim), kv[:, 0]) * scale
            want = torch.einsum("hgn,nhd->hgd", logits.softmax(-1), kv[:, 1]).reshape(kv_heads * group, dim)
            width = records[0].nbytes
            ways = [
                (records.data_ptr() + positions.numpy() * width, 1),
                (records.data_ptr() + positions.numpy() * width, 3),
            ]
            if n == 500:
                ways.append(((records.data_ptr(), width, 500), 2))
                want_in_order = want
            native_split, native.SPLIT = native.SPLIT, 1
            for where, threads in ways:
                out, lse = torch.empty_like(query), torch.empty(1, kv_heads * group)
                native.attend(query[None], [where], str(dtype)[6:], kv_heads, scale, out, lse, threads)
                assert (lse - logits.logsumexp(-1).view(1, -1)).abs().max() < 1e-4 * max(1, scale * dim**0.5 / 4)
                assert (out - want).abs().max() < 2e-5 * max(1, scale * dim**0.5 / 4)
            native.SPLIT = native_split
    assert want_in_order is want


def test_attention_stays_finite_over_huge_logits(isa):
    records = torch.zeros(40, 2, 1, 16)
    records[:, 0] = torch.linspace(-1e4, 1e4, 40).view(40, 1, 1)
    records[:, 1] = torch.arange(40.0).view(40, 1, 1)
    out, lse, where = torch.empty(1, 16), torch.empty(1, 1), [(records.data_ptr(), records[0].nbytes, 40)]
    native.attend(torch.ones(1, 1, 16), where, "float32", 1, 1.0, out, lse)
    assert torch.equal(out, torch.full((1, 16), 39.0))  # the last key's weight is one
    assert lse.item() == 16e4
    native.attend(torch.ones(1, 1, 16), [np.empty(0, np.int64)], "float32", 1, 1.0, out, lse)
    assert not out.any() and lse.item() == -torch.inf  # of no record: what weighs nothing in a merge


@given(
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    grow=st.floats(0.05, 30),
    dim=st.sampled_from([2, 18, 64]),
    seed=st.integers(0, 10**6),
)
@settings(**EACH)
def test_codes_at_append(bits, dtype, sizes, grow, dim, seed):
    """Keys as models give them, transposed, with zeros, exact powers of two and growing scales."""
    torch.manual_seed(seed)
    one, other = KeyCodes(2, 3, dim, bits), KeyCodes(2, 3, dim, bits)
    for i, n in enumerate(sizes):
        keys = torch.randn(2, n, 3, dim).transpose(1, 2) * grow**i
        keys[:, :, :, 0] = 2.0**i * TOP[bits]
        keys[:, 1] *= float(i > 0)
        keys = keys.to(dtype)
        doubled, want = one.append(keys), other.append_reference(keys.float())
        assert torch.equal(doubled, want) and torch.equal(one.scale, other.scale)
        assert torch.equal(one.codes.view(), other.codes.view())


@given(
    heads=st.integers(1, 4), group=st.integers(1, 8), dim=st.sampled_from([2, 18, 64, 128]), seed=st.integers(0, 10**6)
)
@settings(**EACH)
def test_quantised_queries(heads, group, dim, seed):
    torch.manual_seed(seed)
    codes = KeyCodes(2, heads, dim)
    codes.append(torch.randn(2, heads, 9, dim) * torch.rand(dim) ** 8)
    query = torch.randn(heads * group, dim) * 10.0 ** (seed % 7 - 3)
    for wanted in (query, query * 0, query.to(torch.bfloat16)):
        (coded, unit), (want, step) = codes.query(wanted, 1), fold(wanted.float(), codes.scale[1])
        assert torch.equal(coded, want) and np.array_equal(unit, step)


def test_the_library_is_private_and_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script, log = tmp_path / "cc", tmp_path / "log"  # a compiler that notes each run, and writes what -o names
    script.write_text(f'#!/bin/bash\necho run >> {log}\nsleep 0.5\necho library > "${{@: -2:1}}"\n')
    script.chmod(0o755)
    folder, command = builder.private_folder(), [str(script)]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    paths = []
    racers = [threading.Thread(target=lambda: paths.append(builder.build(command, folder))) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert paths[0] == paths[1] and [path.name for path in folder.iterdir()] == [paths[0].name]
    assert log.read_text() == "run\nrun\n"
    assert builder.build(command, folder) == paths[0] and log.read_text() == "run\nrun\n"
    folder.chmod(0o770)  # others could change what runs
    assert builder.private_folder() != folder


def test_without_a_home_the_library_lies_in_a_temporary_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # an id without a passwd entry, as in containers
    assert builder.private_folder().parent == Path(tempfile.gettempdir())


def run_python(code: str, **changes) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | changes
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_without_a_compiler_it_says_so_once_and_works():
    code = (
        "import numpy as np; from hillinfer.evaluator.topk import topk; from hillinfer import native\n"
        "print(topk(np.array([3, 9, 9], np.int32), 2), topk(np.array([3], np.int32), 1), native.available())"
    )
    done = run_python(code, CC="no-such-compiler")
    assert done.stdout.split() == ["[1", "2]", "[0]", "False"]
    assert done.stderr.count("no C compiler was found: install gcc or clang") == 1
    done = run_python(code, HILLINFER_NATIVE="0")
    assert done.stdout.split()[-1] == "False" and not done.stderr


def test_a_compiler_that_fails_is_named(tmp_path):
    with pytest.raises(builder.Unavailable, match="false cannot compile"):
        builder.build(["/bin/false"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_warning_where_it_works():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.available() and native.isa() in native.isas()


FORBID = """
import ctypes, struct
def forbid(call, answer):  # from here on this process gets the errno `answer` for a system call, as in a sandbox
    steps = (0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x50000 | answer), (0x06, 0, 0, 0x7FFF0000)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
"""


@pytest.mark.skipif(bool(ring.why_not()), reason=str(ring.why_not()))
@pytest.mark.parametrize("call", [425, 426], ids=["io_uring_setup", "io_uring_enter"])
def test_a_sandbox_without_io_uring_is_noticed_when_it_is_opened(call):
    code = (
        f"{FORBID}forbid({call}, 1)\nfrom hillinfer.native import ring\n"
        "from hillinfer.tiers.engines import open_engine\n"
        "print(ring.why_not(), open_engine('auto', 2).name)"
    )
    done = run_python(code)
    assert "no io_uring here (Operation not permitted): choose engine threads 2 threads" in done.stdout, done.stderr


needs_io_uring = pytest.mark.skipif(bool(ring.why_not()), reason=str(ring.why_not()))


PLAIN = Namespace(0, 0)  # without blocks: plain reads and writes, which wide entries carry as well


def open_wide(depth: int, nvme: Namespace = PLAIN) -> Rings:
    try:
        return Rings(depth, nvme)
    except OSError as error:
        pytest.skip(f"wide entries need Linux 5.19: {error}")


WIDTHS = pytest.mark.parametrize("make", [Rings, open_wide], ids=["narrow", "wide"])


def pieces(buffer: np.ndarray, *spans: tuple[int, int, int]) -> list[np.ndarray]:
    """Offsets, addresses and lengths of (offset of the file, start in the buffer, bytes)."""
    table = np.array(spans, np.int64)
    return [table[:, 0], buffer.ctypes.data + table[:, 1], table[:, 2]]


@needs_io_uring
@WIDTHS
class TestRings:
    def test_a_ring_reads_what_it_wrote(self, make, tmp_path):
        """More pieces than fit in flight, in any order, thrice: the queues wrap round."""
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        rings, rng = make(8), np.random.default_rng(1)
        data, back = aligned(101 * BLOCK), aligned(101 * BLOCK)
        spans = [(i * BLOCK, i * BLOCK, BLOCK) for i in range(101)]
        for _ in range(3):
            data[:] = rng.integers(0, 256, len(data), dtype=np.uint8)
            rings.transfer(True, fd, *pieces(data, *rng.permutation(spans)))
            rings.transfer(False, fd, *pieces(back, *rng.permutation(spans)))
            assert (data == back).all()
        with pytest.raises(OSError, match="Bad file descriptor, after 0 of 4096 bytes at offset 8192"):
            rings.transfer(False, 9999, *pieces(back, (2 * BLOCK, 0, BLOCK)))
        rings.transfer(False, fd, *pieces(back, *spans))  # still usable
        assert len(rings._free) == 1
        rings.close()
        os.close(fd)

    def test_a_piece_that_fails_is_named_and_the_others_have_ended(self, make, tmp_path):
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, bytes(range(256)) * 16 * 40, 0)
        rings, back = make(4), aligned(80 * BLOCK)
        spans = [(i * BLOCK, 2 * i * BLOCK, (1 + (i == 39)) * BLOCK) for i in range(40)]
        with pytest.raises(OSError, match=f"only 4096 of 8192 bytes at offset {39 * BLOCK}") as error:
            rings.transfer(False, fd, *pieces(back, *spans))
        assert error.value.offset == 39 * BLOCK
        assert all((back[at : at + BLOCK] == np.arange(BLOCK) % 256).all() for _, at, _ in spans)
        rings.transfer(False, fd, *pieces(back, spans[0]))
        assert len(rings._free) == 1  # one and the same ring, all along
        os.close(fd)

    def test_short_transfers_go_on_where_they_ended(self, make):
        reading, writing = os.pipe()
        rings, back, sent = make(4), aligned(BLOCK), np.arange(BLOCK, dtype=np.uint32).view(np.uint8)[:BLOCK]
        os.write(writing, sent[:1000].tobytes())
        later = threading.Timer(0.05, lambda: os.write(writing, sent[1000:].tobytes()))
        later.start()
        rings.transfer(False, reading, *pieces(back, (0, 0, BLOCK)), timeout=30)
        assert (back == sent).all()
        os.write(writing, sent[:96].tobytes())
        os.close(writing)
        with pytest.raises(OSError, match="only 96 of 4096 bytes at offset 0"):
            rings.transfer(False, reading, *pieces(back, (0, 0, BLOCK)), timeout=30)
        later.join()
        os.close(reading)

    def test_no_answer_ends_after_the_timeout_and_its_memory_is_kept(self, make):
        """The kernel may still write to it; once it has, the ring is closed and the memory let go."""
        reading, writing = os.pipe()
        rings, keep = make(4), np.empty(2 * BLOCK, np.uint8)
        gone, where = weakref.ref(keep), pieces(keep, (0, 0, BLOCK), (BLOCK, BLOCK, BLOCK))
        start = time.monotonic()
        with pytest.raises(OSError, match="after 0 of 4096 bytes at offset 0") as error:
            rings.transfer(False, reading, *where, timeout=0.1, keep=keep)
        assert error.value.errno == errno.ETIMEDOUT and 0.09 < time.monotonic() - start < 5
        del keep, error
        assert gone() is not None and ring.release_stuck() == 1 and not rings._free
        other, back = os.pipe(), aligned(BLOCK)
        os.write(other[1], bytes([5]) * BLOCK)
        rings.transfer(False, other[0], *pieces(back, (0, 0, BLOCK)), timeout=30)  # by another ring
        assert (back == 5).all()
        os.close(writing)  # both reads come back
        until = time.monotonic() + 10
        while ring.release_stuck() and time.monotonic() < until:
            time.sleep(0.01)
        gc.collect()  # tracebacks are cycles
        assert gone() is None and ring.release_stuck() == 0
        rings.close()
        for fd in (reading, *other):
            os.close(fd)

    @pytest.mark.parametrize("wrong", [(-1, 0, 1), (0, 0, -1), (2**63 - 1, 0, 1)])
    def test_pieces_that_cannot_be_moved_are_refused(self, make, wrong):
        rings, back = make(4), aligned(2 * BLOCK)
        with pytest.raises(ValueError, match="piece 1 "):
            rings.transfer(False, 0, *pieces(back, (0, 0, 1), wrong))
        offsets, addresses, lengths = pieces(back, (0, 0, BLOCK), (BLOCK, BLOCK, BLOCK))
        for short in ((offsets[:1], addresses, lengths), (offsets, addresses[:1], lengths)):
            with pytest.raises(ValueError, match="numbers"):
                rings.transfer(False, 0, *short)
        with pytest.raises(ValueError, match="piece 1 "):
            rings.transfer(False, 0, offsets, addresses, lengths, sums=np.zeros(1, np.uint32))  # of one block only
        with pytest.raises(TypeError):
            rings.transfer(False, 0, offsets, addresses, lengths, sums=np.zeros(2, np.int32))

    def test_what_is_read_is_compared_with_its_checksums(self, make, tmp_path):
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        rings, sums, data = make(4), Checksums(), aligned(8 * BLOCK)
        data[:] = np.random.default_rng(2).integers(0, 256, len(data), dtype=np.uint8)
        where = pieces(data, (0, 0, 5 * BLOCK), (5 * BLOCK, 5 * BLOCK, 3 * BLOCK))
        sums.note(*where)
        rings.transfer(True, fd, *where)
        table = sums.covering(where[0], where[2])
        rings.transfer(False, fd, *where, sums=table)
        os.pwrite(fd, b"?" if data[6 * BLOCK + 3] != ord("?") else b"!", 6 * BLOCK + 3)
        with pytest.raises(OSError) as error:
            rings.transfer(False, fd, *where, sums=table)
        assert error.value.errno == errno.EBADMSG and error.value.offset == 6 * BLOCK
        os.close(fd)


# struct io_uring_sqe with IORING_SETUP_SQE128 and, at byte 48, struct nvme_uring_cmd of <linux/nvme_ioctl.h>
COMMAND = np.dtype(
    [
        ("opcode", "u1"), ("flags", "u1"), ("rsvd1", "<u2"), ("nsid", "<u4"), ("cdw2", "<u4"), ("cdw3", "<u4"),
        ("metadata", "<u8"), ("addr", "<u8"), ("metadata_len", "<u4"), ("data_len", "<u4"), ("cdw10", "<u4"),
        ("cdw11", "<u4"), ("cdw12", "<u4"), ("cdw13", "<u4"), ("cdw14", "<u4"), ("cdw15", "<u4"),
        ("timeout_ms", "<u4"), ("rsvd2", "<u4"),
    ]
)  # fmt: skip
ENTRY = np.dtype(
    {
        "names": ["opcode", "fd", "cmd_op", "user_data", "command"],
        "formats": ["u1", "<i4", "<u4", "<u8", COMMAND],
        "offsets": [0, 4, 8, 32, 48],
        "itemsize": 128,
    }
)


@pytest.mark.parametrize("write", [False, True])
def test_nvme_commands_are_laid_out_as_the_kernel_expects(write):
    """The bytes of one READ and one WRITE against the kernel's structs and the NVMe command set; all others are 0."""
    offset, address, length = (5 << 32) * 512 + 7 * 512, 0x7F0123456000, 8 * BLOCK
    entry = np.full(1, 0xFF, "V128").view(ENTRY)
    entry.view(np.uint8)[:] = 0xFF
    native.library.hi_nvme_entry(native.pointer(entry), 77, int(write), 3, 512, offset, address, length)
    want = np.zeros(1, ENTRY)
    assert COMMAND.itemsize == 72
    read_or_write = 0x01 if write else 0x02
    numbered = 0b11 << 30 | COMMAND.itemsize << 16 | ord("N") << 8 | 0x80  # _IOWR('N', 0x80, struct nvme_uring_cmd)
    want["opcode"], want["fd"], want["cmd_op"] = 46, 77, numbered
    sent = want["command"]
    sent["opcode"], sent["nsid"], sent["addr"], sent["data_len"] = read_or_write, 3, address, length
    sent["cdw10"], sent["cdw11"], sent["cdw12"] = 7, 5, length // 512 - 1
    assert entry.tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("command", "result", "before", "code", "after"),
    [
        (False, 4096, 0, 0, 4096),
        (False, 1000, 96, errno.EAGAIN, 1096),  # short: the rest is asked for
        (False, 0, 96, -1, 96),  # the file ended
        (False, -errno.EINTR, 96, errno.EAGAIN, 96),
        (False, -errno.EIO, 0, errno.EIO, 0),
        (True, 0, 0, 0, 4096),  # a command is all or nothing
        (True, -errno.EAGAIN, 0, errno.EAGAIN, 0),
        (True, -errno.EINTR, 0, errno.EAGAIN, 0),
        (True, -errno.EACCES, 0, errno.EACCES, 0),
        (True, 0x80, 0, ring.NVME_STATUS + 0x80, 0),
        (True, 0x4281, 0, ring.NVME_STATUS + 0x4281, 0),
    ],
)
def test_results_of_requests(command, result, before, code, after):
    done = np.array([before], np.int64)
    assert native.library.hi_ring_result(int(command), result, 4096, native.pointer(done)) == code
    assert done[0] == after


@needs_io_uring
@pytest.mark.parametrize("wrong", [(512, 0, 256), (256, 0, 512), (0, 0, 0), (0, 0, 512 << 17)])
def test_pieces_that_no_command_can_move_are_refused(wrong):
    with pytest.raises(ValueError, match="piece 0 "):
        open_wide(4, Namespace(1, 512)).transfer(False, 0, *pieces(aligned(BLOCK), wrong))


@needs_io_uring
def test_an_nvme_status_is_an_error_that_names_it(tmp_path, monkeypatch):
    """The controller's refusal of a command, and the kernel's: a plain file takes none."""
    rings, back = open_wide(4, Namespace(1, 512)), aligned(2 * BLOCK)
    where = pieces(back, (0, 0, BLOCK), (BLOCK, BLOCK, BLOCK))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="not supported, after 0 of 4096 bytes") as error:
        rings.transfer(False, fd, *where)
    assert error.value.errno == errno.EOPNOTSUPP and len(rings._free) == 1
    os.close(fd)

    def refused(ring_, fd, write, n, offsets, addresses, lengths, done, failed, *rest):
        assert rest[-2:] == (1, 512)
        run(ring_, fd, write, 0, offsets, addresses, lengths, done, failed, *rest)
        failed._obj.value = 1
        return ring.NVME_STATUS + 0x4281

    run = native.library.hi_ring_run
    monkeypatch.setattr(native.library, "hi_ring_run", refused)
    with pytest.raises(OSError, match=r"NVMe status 0x4281, after .* at offset 4096") as error:
        rings.transfer(False, 0, *where)
    assert error.value.errno == errno.EIO and error.value.offset == BLOCK and len(rings._free) == 1
