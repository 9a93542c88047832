"""The share of records to read in INT4 (LeoAM's dynamic compression).

The paper gives no rule. Here it is the smallest share s for which a layer's transfer takes no longer than its
computation: tokens * ((1 - s) * full + s * packed) / bandwidth + s * tokens * unpacking = computation, with running
means of the measured times. It is 0 if transfer is not the bottleneck.
"""

from dataclasses import dataclass

DECAY = 0.9  # of the running means


@dataclass
class Compression:
    """Running means of times, in seconds."""

    setting: float | str = 0.0  # a fixed share, or "auto"
    per_byte: float = 0.0  # reading
    per_token: float = 0.0  # unpacking
    compute: float = 0.0  # a layer's computation in one step

    def share(self, tokens: int, full: int, packed: int) -> float:
        """Share of `tokens` records to read in INT4; each has `full` bytes, or `packed` in INT4."""
        if self.setting != "auto":
            return float(self.setting)
        transfer = tokens * full * self.per_byte
        gain = tokens * ((full - packed) * self.per_byte - self.per_token)
        if not self.compute or transfer <= self.compute or gain <= 0:
            return 0.0
        return min(1.0, (transfer - self.compute) / gain)

    def observe(self, name: str, seconds: float, units: int = 1) -> None:
        """Update a mean: `units` bytes, tokens or layers took this long."""
        if units:
            before, now = getattr(self, name), seconds / units
            setattr(self, name, DECAY * before + (1 - DECAY) * now if before else now)
