"""One what-if: a model's decode step on a profile, the sizes that follow from it, and the room there is for them."""

import math
from dataclasses import dataclass

import torch

from hillinfer.config import Settings
from hillinfer.run import Run
from hillinfer.systems.shapes import ModelShape
from hillinfer.tiers.geometry import Geometry
from hillinfer.whatif.devices import Profile

USABLE = 0.9  # share of GPU memory for weights and KV; of host memory, 0.8


class DoesNotFit(ValueError):
    """The system cannot hold this case's KV on this profile."""


@dataclass(frozen=True)
class Case:
    """One cell: a model's decode step on a profile. `host` bytes of host memory may hold KV (M0); None: all there is.

    share  the host pool's share of the tokens, forced; None lets the system's own rule decide
    deep   whether records are read many at once; else one at a time
    split  as in `Settings`; bits  of a key code
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
    bits: int = 8

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
        """Key codes of one layer, of `bits` each."""
        return self.context * self.batch * self.shape.code_bytes(self.bits)

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
            run.speeds = self.profile.speeds(self.shape.code_bytes(self.bits), self.shape.record_bytes)
        return run.pool_tokens(self.context) / self.context
