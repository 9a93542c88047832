"""Any order of append, attend, crop, reset, save and open equals plain tensors, whatever holds the KV."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import hillinfer
from hillinfer import open_session, save_session
from hillinfer.systems.registry import POLICIES
from hillinfer.tiers.tiered_store import TieredStore as DriveStore

HEADS, DIM = 2, 16  # of the tiny model
WAYS = {  # where KV lies
    "memory": {},
    "ssd": {"drive_kind": "ssd", "placement": "hits"},
    "ssd, one table": {"drive_kind": "ssd", "placement": "shared-hits", "recent": 3, "sinks": 0},
    "ssd, lru": {"drive_kind": "ssd", "placement": "lru"},
    "emulated": {"drive_kind": "emulated"},
}
WANTED: list[np.ndarray] = []


class Chosen(hillinfer.Policy):
    """What the test chooses."""

    needs_codes = False

    def select(self, step):
        return WANTED[0]


def plain(query: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of query (1, H, q, D) over kv (n, 2, Hkv, D), as (1, q, H, D)."""
    keys, values = (kv[:, i].transpose(0, 1).repeat_interleave(query.shape[1] // HEADS, 0)[None] for i in range(2))
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=0.25)
    return out.transpose(1, 2)


class Machine(RuleBasedStateMachine):
    model = None
    ways = tuple(WAYS)

    @initialize(way=st.sampled_from(range(len(WAYS))), seed=st.integers(0, 2**20))
    def start(self, way, seed):
        self.folder = Path(tempfile.mkdtemp())
        self.torch = torch.Generator().manual_seed(seed)
        self.cache = hillinfer.make_cache(self.model, "chosen", **self.options(way))
        self.kv = [torch.empty(0, 2, HEADS, DIM) for _ in self.cache.layers]
        self.saved = None

    def options(self, way: int) -> dict:
        own = WAYS[self.ways[way % len(self.ways)]]
        return {"alpha": 0.3, "lookahead": False, **own} | ({"drive": self.folder} if own else {})

    @property
    def n(self) -> int:
        return len(self.kv[0])

    def push(self, layer: int, m: int):
        new = torch.randn(m, 2, HEADS, DIM, generator=self.torch)
        self.kv[layer] = torch.cat((self.kv[layer], new))
        keys, values = new.permute(1, 2, 0, 3)[:, None]
        return self.cache.layers[layer].update(keys, values)

    @rule(m=st.integers(2, 150))
    def append(self, m):
        for layer in range(len(self.kv)):
            self.push(layer, m)

    @rule(m=st.integers(2, 9))
    def turn(self, m):
        """Several tokens at once attend exactly."""
        for layer in range(len(self.kv)):
            keys, values = self.push(layer, m)
            query = torch.randn(1, 4, m, DIM, generator=self.torch)
            mask = torch.ones(1, 1, m, self.n, dtype=torch.bool).tril(self.n - m)
            if isinstance(keys, torch.Tensor):
                got = plain(query, torch.stack((keys[0], values[0])).permute(2, 0, 1, 3), mask)
            else:
                got = keys.attend(query, mask, 0.25)
            torch.testing.assert_close(got, plain(query, self.kv[layer], mask), atol=1e-5, rtol=1e-4)

    @precondition(lambda self: self.n)
    @rule(data=st.data(), steps=st.integers(1, 4))
    def step(self, data, steps):
        """One token attends to chosen ones; those from the drive may be promoted, and others demoted."""
        for _ in range(steps):
            n = self.n + 1
            count = data.draw(st.integers(1, self.cache.run.settings.budget(n)))
            base, stride = data.draw(st.integers(0, n - 1)), data.draw(st.sampled_from([1, 3, 7]))
            WANTED[:] = [np.unique((base + stride * np.arange(count)) % n)]
            for layer in range(len(self.kv)):
                held = self.push(layer, 1)[0]
                query = torch.randn(1, 4, 1, DIM, generator=self.torch)
                got = held.attend(query, None, 0.25)
                want = plain(query, self.kv[layer][WANTED[0]])
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)

    @precondition(lambda self: self.n > 1)
    @rule(data=st.data())
    def crop(self, data):
        n = data.draw(st.integers(1, self.n - 1))
        self.cache.crop(n - self.n)
        self.kv = [kv[:n] for kv in self.kv]

    @rule()
    def reset(self):
        self.cache.reset()
        self.kv = [kv[:0] for kv in self.kv]

    @precondition(lambda self: self.n)
    @rule()
    def save(self):
        save_session(self.cache, self.folder / "doc.kv", self.model, range(self.n))
        self.saved = list(self.kv)

    @precondition(lambda self: self.saved)
    @rule(way=st.integers(0, 99))
    def open(self, way):
        self.cache.close()
        self.cache, ids = open_session(self.folder / "doc.kv", self.model, "chosen", **self.options(way))
        assert ids == list(range(len(self.saved[0])))
        self.kv = list(self.saved)

    @invariant()
    def holds(self):
        if not hasattr(self, "kv"):
            return
        assert self.cache.get_seq_length() == self.n
        for kv, layer in zip(self.kv, self.cache.layers, strict=True):
            if not self.n:
                continue
            store = layer.layer.store
            assert torch.equal(store.all()[0][0], kv)
            if isinstance(store, DriveStore):
                slots = store.pools[0].slots(np.arange(self.n))
                assert torch.equal(store.pools[0].records.view()[slots[slots >= 0]], kv[torch.from_numpy(slots >= 0)])

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()
            left = {path.name for path in self.folder.iterdir()}
            shutil.rmtree(self.folder)
            assert left <= {"doc.kv"}


def run(model, monkeypatch, ways: tuple, examples: int, steps: int) -> None:
    monkeypatch.setitem(POLICIES, "chosen", Chosen)
    machine = type("Machine", (Machine,), {"model": model, "ways": ways})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(machine, settings=chosen)


def test_any_order_of_operations_equals_plain_tensors(models, monkeypatch):
    run(models("llama"), monkeypatch, tuple(WAYS)[:4], 12, 15)


@pytest.mark.slow
def test_any_order_of_operations_at_length(models, monkeypatch):
    run(models("llama"), monkeypatch, tuple(WAYS), 200, 40)
