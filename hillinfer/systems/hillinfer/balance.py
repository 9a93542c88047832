"""How much of the KV the host should hold for the shortest step (HillInfer APP, section 1.4)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectionRates:
    """Selection rate per side: the fraction of its resident tokens that a step selects."""

    host: float
    drive: float


@dataclass(frozen=True)
class Speeds:
    """Throughput of host and drive in bytes/s, from a device profile (`Profile.speeds`).

    fc, fs  key codes scored by the host, by the drive
    bc, bs  selected records moved to the model's device from the host's pool, from the drive
    """

    fc: float
    fs: float
    bc: float
    bs: float

    def beta(self, alpha: float, code_bytes: int, record_bytes: int) -> float:
        """Ratio of host to drive tokens at which both sides take equally long, by the paper's second version:

        Mc/fc + a*Mc/Bc = Ms/fs + a*Ms/Bs, here in tokens with `code_bytes` to score and `record_bytes` to move. The
        step is shortest there if each side sends as soon as it has scored; here it cannot (`step_seconds`).
        """
        host = code_bytes / self.fc + alpha * record_bytes / self.bc
        drive = code_bytes / self.fs + alpha * record_bytes / self.bs
        return drive / host

    def step_seconds(self, share: float, rates: SelectionRates, code_bytes: int, record_bytes: int) -> float:
        """Seconds of a step per cached token if the host holds `share` of the tokens.

        Both sides score concurrently; selection needs both results; the selected records are moved after it.
        """
        scoring = max(share * code_bytes / self.fc, (1 - share) * code_bytes / self.fs)
        moving = share * rates.host / self.bc + (1 - share) * rates.drive / self.bs
        return scoring + moving * record_bytes

    def host_share(self, rates: SelectionRates, code_bytes: int, record_bytes: int) -> float:
        """The host's share of all tokens that minimises `step_seconds`.

        The time is linear on both sides of fc / (fc + fs), so its minimum is there (the paper's first version, beta =
        fc/fs) or at an end: all in memory if the drive's transfers cost more than the host's scoring.
        """
        shares = (1.0, self.fc / (self.fc + self.fs), 0.0)  # the largest of equally good ones
        return min(shares, key=lambda share: self.step_seconds(share, rates, code_bytes, record_bytes))

    def split(self, how: str, rates: SelectionRates, alpha: float, code_bytes: int, record_bytes: int) -> float:
        """The host's share of the tokens, by `Settings.split`: for the `shortest` step, or by the `paper`'s beta."""
        if how == "paper":
            beta = self.beta(alpha, code_bytes, record_bytes)
            return beta / (1 + beta)
        return self.host_share(rates, code_bytes, record_bytes)
