"""What the SmartSSD's evaluation kernel costs and does, by configuration (HillInfer CEC): a table that was measured.

Cycles are simulated and areas synthesised from the kernel's source: `make -C fpga table` measures all again and writes
cec.json beside this file, with the tools' versions. Clocks and memory rates are assumptions, named where they are used:
no card and no timing tool took part.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
CLOCK = 300e6  # Hz, assumed: the shell's default kernel clock; no Fmax is known
# Bytes/s. DDR: 15.4e9 was measured on the card, 19.2e9 is its 64-bit DDR4-2400; NAND: the card's own flash.
MEMORIES = {"DDR4 peak": 19.2e9, "DDR4 measured": 15.4e9, "NAND": 3.2e9, "NAND, one stream": 2.4e9}
# The xcku15p's totals; the platform's shell takes a share of them.
DEVICE = {"LUT": 522_720, "FF": 1_045_440, "DSP": 1_968, "BRAM36": 984, "URAM": 128}


@dataclass(frozen=True)
class Configuration:
    """A kernel's parameters, and what was measured of it.

    cycles       a token and KV head, at 131,072 tokens, k = 4,096, 8 heads in one call; memory as fast as the port
    cycles_75    the same with a memory of three quarters of that
    cycles_all   a token and KV head where every score is sent (HIE's score blocks), and `call_cycles` more for a call
    area         LUT, FF, DSP, BRAM36, URAM
    recall       share of the tokens in the exact best 10 % and 20 % that its codes find (embedded model, 4K tokens)
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

    @property
    def token_bytes(self) -> int:
        return self.head_dim * self.bits // 8

    @property
    def overhead(self) -> float:
        """Cycles over those that the memory port alone would take, as a share."""
        return self.cycles * self.lanes / self.token_bytes - 1

    def tokens_per_second(self, memory: float, clock: float = CLOCK) -> float:
        """Tokens of one KV head at this clock (Hz) with keys from a memory (bytes/s): the slower of the two."""
        return min(clock / self.cycles, memory / self.token_bytes)

    def code_rate(self, head_dim: int, clock: float = CLOCK) -> float:
        """Codes that are scored in a second, where all scores are sent; narrower heads leave places empty."""
        return min(head_dim, self.head_dim) * clock / self.cycles_all

    @property
    def call_seconds(self) -> float:
        return self.call_cycles / CLOCK

    def share(self) -> float:
        """Of the device: the largest share of any kind of resource."""
        return max(self.area[kind] / total for kind, total in DEVICE.items())


@functools.cache
def configurations() -> tuple[Configuration, ...]:
    """All that were measured."""
    return tuple(Configuration(**row) for row in json.loads(TABLE.read_text())["rows"])


def tools() -> dict[str, str]:
    """What measured them: tools with versions, and the digest of the kernel's source."""
    return json.loads(TABLE.read_text())["tools"]


def choose(bits: int, head_dim: int) -> Configuration:
    """The fastest configuration for codes of so many bits whose head_dim is at least this, or else the widest."""
    own = [c for c in configurations() if c.bits == bits]
    wide = [c for c in own if c.head_dim >= head_dim] or [max(own, key=lambda c: c.head_dim)]
    least = min(c.head_dim for c in wide)
    return min((c for c in wide if c.head_dim == least), key=lambda c: (c.cycles, abs(c.group - 4)))
