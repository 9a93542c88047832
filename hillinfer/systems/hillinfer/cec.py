"""Speed, area and recall of the SmartSSD's evaluation kernel by configuration (HillInfer CEC), from a measured table.

Cycles are simulated and areas synthesised from the kernel's source: `make -C fpga table` repeats the measurement and
writes cec.json next to this file, with tool versions. Clocks and memory rates are assumptions, marked as such: neither
a card nor a timing tool was used.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
CLOCK = 300e6  # Hz, assumed: the shell's default kernel clock; Fmax is unknown


@dataclass(frozen=True)
class Configuration:
    """A kernel's parameters and measurements.

    cycles       per token and KV head, at 131,072 tokens, k = 4,096, 8 heads in one call; memory as fast as the port
    cycles_75    the same with memory at three quarters of that speed
    cycles_all   per token and KV head if every score is sent (HIE's score blocks), plus `call_cycles` per call
    area         LUT, FF, DSP, BRAM36, URAM
    recall       fraction of the exact top 10 % and 20 % of tokens that its codes find (embedded model, 4K tokens)
    """

    bits: int
    head_dim: int
    group: int
    lanes: int  # bytes of the memory port
    cycles: float
    cycles_75: float
    cycles_all: float
    call_cycles: float
    area: dict[str, float]
    recall: dict[str, float]

    @property
    def name(self) -> str:
        return f"int{self.bits}-d{self.head_dim}-g{self.group}-l{self.lanes}"

    def code_rate(self, head_dim: int, clock: float = CLOCK) -> float:
        """Codes scored per second if all scores are sent. Heads narrower than the kernel's leave lanes idle."""
        return min(head_dim, self.head_dim) * clock / self.cycles_all

    @property
    def call_seconds(self) -> float:
        return self.call_cycles / CLOCK


@functools.cache
def configurations() -> tuple[Configuration, ...]:
    """All measured configurations."""
    return tuple(Configuration(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"])


def choose(bits: int, head_dim: int) -> Configuration:
    """The fastest configuration for these bits with at least this head_dim; if there is none, the widest."""
    fitting = [c for c in configurations() if c.bits == bits]
    wide = [c for c in fitting if c.head_dim >= head_dim] or [max(fitting, key=lambda c: c.head_dim)]
    least = min(c.head_dim for c in wide)
    return min((c for c in wide if c.head_dim == least), key=lambda c: (c.cycles, abs(c.group - 4)))
