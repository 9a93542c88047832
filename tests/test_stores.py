"""One contract for every store: any order of appends, attention, prefetches and truncations equals plain tensors; a
drive that fails names the place; an in-memory step and a drive read take few frames; a new system is one folder.
"""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hillinfer
from benchmarks.faulty_drive import FaultyDrive
from hillinfer import Settings, attention, native
from hillinfer.errors import DriveError, UsageError
from hillinfer.evaluator.codes import KeyCodes
from hillinfer.evaluator.policies import TopK
from hillinfer.native import ring
from hillinfer.run import Run
from hillinfer.systems.hillinfer.run import AttendingRun, ScoringRun
from hillinfer.systems.leoam.run import LeoAMRun
from hillinfer.systems.lossless.run import StreamedRun
from hillinfer.systems.registry import SYSTEMS, System
from hillinfer.tiers.geometry import Geometry
from hillinfer.timeline import Track

HEADS, GROUP, DIM, LAYERS, SCALING = 2, 2, 16, 2, 0.25
WAYS = {
    "host": (Run, {}),
    "tiered": (Run, {"drive_kind": "ssd"}),
    "tiered, no pool": (Run, {"drive_kind": "ssd", "host_budget": 0}),
    "tiered, threads": (Run, {"drive_kind": "ssd", "engine": "threads"}),
    "packed": (LeoAMRun, {"drive_kind": "ssd", "compress": 1e-9}),  # a share that rounds to no record: exact
    "scoring": (ScoringRun, {"drive_kind": "emulated"}),
    "attending": (AttendingRun, {"drive_kind": "emulated"}),
    "tensors, in memory": (StreamedRun, {"stream": "host", "host_budget": "1GB", "max_tokens": 4096}),
    "tensors, page cache": (StreamedRun, {"stream": "page-cache"}),
    "tensors, direct": (StreamedRun, {"stream": "direct", "pipelining": "cross"}),
}
ON_A_DRIVE = [name for name in WAYS if name not in ("host", "tensors, in memory")]


@dataclass
class Held:
    """The stores of one run, and what they must hold."""

    run: Run
    batch: int
    stores: list = field(default_factory=list)
    codes: list = field(default_factory=list)
    kv: list = field(default_factory=list)  # of each layer, (B, n, 2, Hkv, D)

    def __post_init__(self):
        geometry = Geometry(self.batch, HEADS, DIM, torch.float32, torch.device("cpu"))
        self.run.start(geometry, 300)
        for layer in range(LAYERS):
            self.stores.append(self.run.open_store(Track(self.run.timeline, self.run.counters, layer)))
            self.codes.append(KeyCodes(self.batch, HEADS, DIM))
            self.kv.append(torch.empty(self.batch, 0, 2, HEADS, DIM))

    @property
    def n(self) -> int:
        return self.kv[0].shape[1]

    def append(self, layer: int, n: int) -> None:
        new = torch.randn(self.batch, n, 2, HEADS, DIM)
        doublings = self.codes[layer].append(new[:, :, 0].transpose(1, 2))
        coded = (self.codes[layer].newest(n), doublings) if self.stores[layer].scores_keys else None
        self.stores[layer].append(new, coded)
        self.kv[layer] = torch.cat((self.kv[layer], new), 1)

    def truncate(self, n: int) -> None:
        for layer, store in enumerate(self.stores):
            store.truncate(n)
            self.codes[layer].truncate(n)
            self.kv[layer] = self.kv[layer][:, :n]


def made(way: str, folder: Path, batch: int = 2) -> Held:
    kind, options = WAYS[way]
    options = options | ({"drive": folder} if options else {})
    return Held(kind(Settings(alpha=0.3, recent=4, **options), LAYERS), batch)


def expected(query, kv, picks, valid, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition in float64: (B, 1, H, D) and the logsumexp (B, H)."""
    shown = torch.zeros(kv.shape[:2], dtype=torch.bool)
    for row, pick in enumerate(picks):
        shown[row, slice(None) if pick is None else torch.from_numpy(pick)] = True
    shown &= True if valid is None else valid
    keys, values = kv.double().repeat_interleave(GROUP, 3).unbind(2)  # (B, n, H, D)
    logits = torch.einsum("bhd,bnhd->bhn", query[:, :, 0].double(), keys) * SCALING
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits.masked_fill_(~shown[:, None], -torch.inf)
    return torch.einsum("bhn,bnhd->bhd", logits.softmax(-1), values)[:, None], logits.logsumexp(-1)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("kernels", [True, False])
def test_any_order_of_operations_equals_plain_tensors(way, kernels, data, tmp_path_factory):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    rng, folder = np.random.default_rng(data.draw(st.integers(0, 2**20))), tmp_path_factory.mktemp("drive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "is_native", lambda query, real=attention.is_native: kernels and real(query))
        held = made(way, folder)
        try:
            for number in range(data.draw(st.integers(1, 5))):
                if held.n and data.draw(st.booleans()):
                    held.truncate(data.draw(st.integers(1, held.n)))
                more = data.draw(st.sampled_from([1, 3, 130] if number else [40, 300]))
                for layer in range(LAYERS):
                    held.append(layer, more)
                for layer in range(LAYERS):
                    check(held, layer, rng, data.draw(st.sampled_from(["all", "some", "one each"])))
        finally:
            held.run.stop()
    assert not list(folder.iterdir())


def check(held: Held, layer: int, rng, how: str) -> None:
    """Attention twice, so that what was promoted serves the second; then every way to read it all."""
    store, kv, n = held.stores[layer], held.kv[layer], held.n
    valid = torch.ones(held.batch, n, dtype=torch.bool)
    valid[1, : n // 3] = False  # left padding
    valid = valid if n > 3 else None
    picks = [None] * held.batch
    if how != "all":
        counts = [max(1, n // 4), max(1, n // (4 if how == "some" else 2))]
        picks = [np.unique(np.append(rng.choice(n, count), n - 1)) for count in counts]
    wanted = [None] * held.batch if isinstance(held.run, AttendingRun) else picks
    for turn in range(2):
        query, seen = torch.randn(held.batch, HEADS * GROUP, 1, DIM), []
        if turn and store.can_prefetch:
            for row, pick in enumerate(picks):
                store.prefetch(row, np.arange(n) if pick is None else pick)
        watch = None if turn or isinstance(held.run, AttendingRun) else lambda *shown, seen=seen: seen.append(shown)
        rows = len(held.run.counters.rows)
        softcap = float(rng.choice([0.0, 0.7]))
        out, lse = store.attend(query, picks, valid, SCALING, watch, softcap)
        want, total = expected(query, kv, wanted, valid, softcap)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(lse.double(), total, atol=2e-5, rtol=2e-4)
        (hits,) = held.run.counters.rows[rows:]
        assert hits.layer == layer and hits.cached == n and hits.queries == hits.device + hits.host + hits.drive
        assert hits.queries == sum(n if pick is None else len(pick) for pick in wanted)
        assert hits.attended == int((valid if valid is not None else torch.ones(held.batch, n)).sum()) or how != "all"
        if watch:
            (records, shown), count = seen[0], max(n if pick is None else len(pick) for pick in picks)
            assert records.shape == (held.batch, count, 2, HEADS, DIM)
            assert shown is None or shown.shape == (held.batch, count)
    assert torch.equal(store.all()[0], kv)
    assert torch.equal(torch.cat([part.clone() for part in store.parts()], 1), kv)
    store.settle()
    some = np.unique(rng.choice(n, max(1, n // 3)))
    assert torch.equal(store.fetch(1, some)[0], kv[1, torch.from_numpy(some)])
    store.settle()
    assert store.n == n and all(type(size) is int and size >= 0 for size in store.memory().values())
    if store.can_prefetch and way_has_scores(held):
        own = held.codes[layer]
        query = torch.randint(-127, 128, (HEADS, GROUP, DIM), dtype=torch.int8)
        score = own.scorer(query, 0)
        assert np.array_equal(store.scores(0, query, score, 0), score(None))


def way_has_scores(held: Held) -> bool:
    return not isinstance(held.run, AttendingRun)


@pytest.mark.parametrize("way", WAYS)
def test_sequences_are_reordered_in_memory_only(way, tmp_path):
    held = made(way, tmp_path)
    held.append(0, 30)
    if way == "host":
        held.stores[0].reorder(torch.tensor([1, 1]))
        assert torch.equal(held.stores[0].all()[0], held.kv[0][[1, 1]])
    else:
        with pytest.raises(UsageError, match="num_beams=1"):
            held.stores[0].reorder(torch.tensor([1, 1]))
    held.run.stop()


def files(run: Run) -> list:
    """Every open file of a run."""
    tensors = getattr(run, "tensors", None)
    worker = getattr(run.drive, "_worker", None)
    known = [
        worker.file if worker else run.drive,
        getattr(run, "packed", None),
        *(tensors.paths.values() if tensors else ()),
    ]
    return [file for file in known if hasattr(file, "engine")]


def written(held: Held) -> None:
    """Wait until everything that can be on the drive is there."""
    for log in (log for store in held.stores for log in getattr(store, "logs", [])):
        for part in (log, getattr(log, "exact", None), getattr(log, "packed", None)):
            if hasattr(part, "flush"):
                part.flush()
    if tensors := getattr(held.run, "tensors", None):
        for tensor in tensors.tensors:
            tensor.settle()
        tensors.slots.drop()


@pytest.mark.parametrize("way", ON_A_DRIVE)
@pytest.mark.parametrize(
    ("fault", "words"),
    [("read error", r"read failed at layer \d, sequence \d, position \d+"), ("gone at a read", "read failed at layer")]
    + [("flipped bit", "is not what was written there"), ("short read", r"only \d+ of \d+ bytes")],
)
def test_a_failing_engine_is_an_error_that_names_the_place(way, fault, words, tmp_path):
    held = made(way, tmp_path)
    for layer in range(LAYERS):
        held.append(layer, 300)
    for part in [log for store in held.stores for log in getattr(store, "logs", [])]:
        getattr(part, "flush", (getattr(part, "exact", None) and part.exact.flush) or (lambda: None))()
    if getattr(held.run, "tensors", None):
        for tensor in held.run.tensors.tensors:
            tensor.settle()
        held.run.tensors.slots.drop()
    faulty = FaultyDrive(fault)
    for file in files(held.run):
        faulty.install(file)
    with pytest.raises(DriveError, match=words):
        for layer, store in enumerate(held.stores * 2):
            store.attend(torch.randn(2, HEADS * GROUP, 1, DIM), [np.arange(0, 300, 2)] * 2, None, SCALING)
            store.truncate(300 - 20 * (layer // LAYERS + 1))
    faulty.remove()
    held.run.stop()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ON_A_DRIVE)
def test_a_full_drive_is_an_error_at_once(way, tmp_path):
    held = made(way, tmp_path)
    for file in files(held.run):
        FaultyDrive("full").install(file)
    with pytest.raises(DriveError, match=r"no room for [\d,]+ bytes of KV"):
        for layer in range(LAYERS):
            held.append(layer, 300)
            held.stores[layer].attend(torch.randn(2, HEADS * GROUP, 1, DIM), [np.arange(9)] * 2, None, SCALING)
    held.run.stop()


PACKAGE = str(Path(hillinfer.__file__).parent)


def frames(until: str) -> list[str]:
    """The package's functions on the stack, from the innermost to `until`."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_qualname)
            if found[-1] == until:
                return found
        frame = frame.f_back
    return []


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_a_step_reaches_its_kernels_through_few_functions(models, prompt, monkeypatch):
    model, ways = models("llama"), []

    def spied(real):
        def spy(*args, **options):
            ways.append([real.__name__, *frames("attention")])
            return real(*args, **options)

        return spy

    for name in ("attend", "score", "head_ranks", "quantise_query", "encode"):
        monkeypatch.setattr(native, name, spied(getattr(native, name)))
    with hillinfer.make_cache(model, "topk", alpha=0.2) as cache:
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
    met = {way[0]: way for way in ways if len(way) > 1}
    assert {"attend", "score", "head_ranks", "quantise_query"} <= set(met)
    assert max(len(way) for way in ways) <= 8, max(ways, key=len)
    assert met["attend"] == ["attend", "over_records", "Store.attend", "Layer.attend", "HeadsLayer.attend", "attention"]


def test_a_drive_read_takes_few_frames(models, prompt, tmp_path, monkeypatch):
    if reason := ring.why_not():
        pytest.skip(reason)
    model, ways, real = models("llama"), [], ring.Rings.transfer

    def spy(self, write, *rest):
        if not write and (way := frames("Layer.attend")):
            ways.append(["Rings.transfer", *way])
        return real(self, write, *rest)

    options = dict(alpha=0.2, host_budget=20_000, drive=tmp_path, lookahead=False)
    with hillinfer.make_cache(model, "hillinfer", **options) as cache:
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        for layer in cache.layers:
            layer.layer.store.logs[0].flush()
        monkeypatch.setattr(ring.Rings, "transfer", spy)
        with torch.no_grad():
            model(prompt[:, -1:], past_key_values=cache)
    assert ways and max(map(len, ways)) <= 8, max(ways, key=len)


WING = '''"""A system that counts the reads of its store."""

from hillinfer.run import Run
from hillinfer.tiers.store import HostStore


class CountingStore(HostStore):
    calls = 0

    def find(self, row, positions):
        CountingStore.calls += 1
        return super().find(row, positions)


class CountingRun(Run):
    def open_store(self, track):
        return CountingStore(self.geometry, track)
'''


def test_a_new_system_is_one_folder_and_one_line(models, prompt, tmp_path, monkeypatch):
    (tmp_path / "counting").mkdir()
    (tmp_path / "counting" / "__init__.py").write_text(WING)
    monkeypatch.syspath_prepend(tmp_path)
    wing = importlib.import_module("counting")
    monkeypatch.setitem(SYSTEMS, "counting", System(TopK, "counts its reads", wing.CountingRun))  # the line
    model, tokens = models("llama"), {}
    assert "counting" in hillinfer.list_systems()
    for system in ("topk", "counting"):
        with hillinfer.make_cache(model, system, alpha=0.2) as cache:
            tokens[system] = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(*tokens.values()) and wing.CountingStore.calls > 0
