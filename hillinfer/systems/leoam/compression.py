"""Which share of what the drive sends should be INT4 (LeoAM section on dynamic compression).

The paper gives no rule. Here the share is the smallest with which a layer's transfer takes no longer than its
computation: tokens * ((1 - s) * full + s * packed) / bandwidth + s * tokens * unpacking = computation, solved for s,
with what was measured in the steps before. It is 0 where the transfer is not the longer side.
"""

from dataclasses import dataclass

KEEP = 0.9  # of the running means


@dataclass
class Compression:
    """`setting` is "auto" or a fixed share. Times in seconds."""

    setting: float | str = 0.0
    per_byte: float = 0.0  # reading
    per_token: float = 0.0  # unpacking
    compute: float = 0.0  # a layer's own work in one step

    def share(self, tokens: int, full: int, packed: int) -> float:
        """Share of `tokens` records, of `full` bytes each and `packed` if in INT4, to read in INT4."""
        if self.setting != "auto":
            return float(self.setting)
        transfer = tokens * full * self.per_byte
        gain = tokens * ((full - packed) * self.per_byte - self.per_token)
        if not self.compute or transfer <= self.compute or gain <= 0:
            return 0.0
        return min(1.0, (transfer - self.compute) / gain)

    def note(self, name: str, seconds: float, units: int = 1) -> None:
        """`units` bytes, tokens or layer steps took so long."""
        if units:
            before, now = getattr(self, name), seconds / units
            setattr(self, name, KEEP * before + (1 - KEEP) * now if before else now)
