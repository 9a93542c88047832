"""A layer's store in host memory, as it is seen from a model on a GPU that holds the key codes and selects there."""

from collections.abc import Callable
from dataclasses import replace

import torch

from hillinfer.attention import to_device
from hillinfer.evaluator.policy import Policy, each_row
from hillinfer.layer import Layer


class Away:
    """The contract of `Store` for tensors of another device. A decode step's new token waits for its query: records,
    query and the positions selected come to the host together.

    step  the mask, and what is `foreseen` for the layer to come; None outside of a decode step
    """

    lane = "gpu"  # where selections are made

    def __init__(self, bring: Callable, layer: Layer, store, geometry):
        self.bring, self.layer, self.store, self.geometry = bring, layer, store, geometry
        self.step = self.new = None

    def __getattr__(self, name: str):
        if name.startswith("__"):  # of a copy that has no store yet
            raise AttributeError(name)
        return getattr(self.store, name)

    @property
    def n(self) -> int:
        return self.store.n + (self.new is not None)

    def append(self, kv: torch.Tensor, codes=None) -> None:
        if self.step:
            self.new = kv
        else:
            self.store.append(kv.cpu())

    def attend(self, query: torch.Tensor, picks: list | tuple, valid, scaling: float, watch=None, *how) -> tuple:
        """See `Store.attend`. The output goes back without a wait."""
        (mask, ahead), new, self.step, self.new = self.step, self.new, None, None
        chosen = [picks, ahead and ahead[-1]]
        sent = [part for pick in chosen if isinstance(pick, tuple) for part in pick]
        mask, new, asked, *sent = self.bring(self.layer, mask, new, query, *sent)
        chosen = [each_row(sent.pop(0), sent.pop(0)) if isinstance(pick, tuple) else pick for pick in chosen]
        if ahead:
            ahead[0].speculate(*ahead[1:-1], chosen[1])
        with self.layer.track.span("cpu", "append", new.nbytes):
            self.store.append(new)
        if mask is not None:
            mask = mask[:, 0, 0, : self.n].repeat_interleave(len(query) // len(mask), 0)
        out = self.store.attend(asked, chosen[0], mask, scaling, watch, *how)
        return tuple(part if part is None else to_device(part, query.device) for part in out)

    def truncate(self, n: int) -> None:
        self.step = self.new = None
        if n < self.store.n:
            self.store.truncate(n)

    def reorder(self, rows: torch.Tensor) -> None:
        self.store.reorder(rows)
        self.geometry = replace(self.geometry, batch=len(rows))


def suits(layer: Layer, keys: torch.Tensor) -> bool:
    """True if a layer's codes, of these first keys or of `max_tokens`, are to be in the memory of the keys' GPU."""
    run, policy, settings = layer.run, layer.policy, layer.run.settings
    if not (policy.there and policy.needs_codes and type(policy).attended is Policy.attended):
        return False
    if settings.bits == 2 or settings.compress or settings.drive_kind != "ssd":  # codes or times are for the host
        return False
    if keys.device != run.later.device:  # a second GPU's
        return False
    if run.later.room is None:
        free = torch.get_device_module(keys.device).mem_get_info(keys.device)[0]
        run.later.room = free // 2 if settings.device_budget is None else settings.device_budget
    tokens = max(keys.shape[2], settings.max_tokens or 0)
    return run.layers * tokens * keys[:, :, 0].numel() * 9 // 8 <= run.later.room  # with a buffer's spare capacity
