"""A what-if scenario: a model's decode step on a device profile, its sizes, and the available memory."""

import math
from dataclasses import dataclass

from hillinfer.config import Settings
from hillinfer.pipeline.pool_size import pool_tokens
from hillinfer.systems.hillinfer.balance import SelectionRates
from hillinfer.systems.hillinfer.profile import Profile
from hillinfer.systems.shapes import ModelShape

GPU_USABLE, HOST_USABLE = 0.9, 0.8  # shares of GPU and host memory for weights and KV


class DoesNotFit(ValueError):
    """The system cannot hold this scenario's KV on this profile."""


@dataclass(frozen=True)
class Scenario:
    """A model's decode step on a profile.

    host   bytes of host memory for KV (M0); None: all that is usable
    split  as in `Settings`
    bits   of a key code
    """

    profile: Profile
    shape: ModelShape
    context: int
    batch: int = 1
    alpha: float = 0.2
    host: float | None = None
    split: str = "shortest"
    bits: int = 8

    @property
    def kv(self) -> int:
        """KV bytes of all layers."""
        return self.shape.kv_bytes(self.context, self.batch)

    @property
    def layer(self) -> int:
        """KV bytes of one layer."""
        return self.kv // self.shape.layers

    @property
    def selected(self) -> int:
        """KV bytes of one layer that a step attends to, by the settings' own rule."""
        return self.layer // self.context * Settings(alpha=self.alpha).budget(self.context)

    @property
    def codes(self) -> int:
        """Bytes of one layer's key codes."""
        return self.context * self.batch * self.shape.code_bytes(self.bits)

    @property
    def on_gpu(self) -> float:
        """Bytes of weights resident on the model's device; the rest crosses the link in each step."""
        return min(self.shape.weight_bytes, GPU_USABLE * self.profile.get("gpu.memory", default=math.inf))

    @property
    def gpu_room(self) -> float:
        """GPU memory for KV, beside the weights."""
        return GPU_USABLE * self.profile.get("gpu.memory") - self.on_gpu if self.profile.has("gpu") else 0.0

    @property
    def host_room(self) -> float:
        """Host memory for KV and codes, beside the weights in host memory."""
        weights = self.shape.weight_bytes - (self.on_gpu if self.profile.has("gpu") else 0)
        room = HOST_USABLE * self.profile.get("cpu.memory") - weights
        return max(0.0, room if self.host is None else min(self.host, room))

    def held(self) -> float:
        """Share of the KV that fits in host memory."""
        return min(1.0, self.host_room / self.kv)

    def pool(self) -> float:
        """The hot pool's share of the tokens, sized as in a run."""
        budget, share = int(self.host_room), None
        settings = Settings(alpha=self.alpha, host_budget=budget)
        if self.profile.has("scorer"):
            code, record = self.shape.code_bytes(self.bits), self.shape.record_bytes
            rates = SelectionRates(self.alpha, self.alpha)
            share = self.profile.speeds(record).split(self.split, rates, self.alpha, code, record)
        return pool_tokens(settings, self.context, self.kv // self.context, budget, share) / self.context
