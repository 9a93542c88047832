"""How much of the KV the host should hold for the shortest step (HillInfer APP, section 1.4)."""

import math
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from hillinfer import files
from hillinfer.errors import UsageError


@dataclass(frozen=True)
class Chosen:
    """What share of the tokens that it holds a step selects from the host, from the drive."""

    host: float
    drive: float


@dataclass(frozen=True)
class Speeds:
    """What host and drive do in a second, in bytes; measured by `hillinfer profile` on the machine at hand.

    fc, fs  key codes scored by the host, by the drive
    bc, bs  records of chosen tokens brought to the model's device from the host's pool, from the drive
    """

    fc: float
    fs: float
    bc: float
    bs: float

    def beta(self, alpha: float, code_bytes: int, record_bytes: int) -> float:
        """Host's over drive's share of the tokens where both take equally long, by the paper's second version:

        Mc/fc + a*Mc/Bc = Ms/fs + a*Ms/Bs, here in tokens, each of `code_bytes` to score and `record_bytes` to move. It
        is where a step is shortest if each side sends as soon as it has scored; here it cannot (`step_seconds`).
        """
        host = code_bytes / self.fc + alpha * record_bytes / self.bc
        drive = code_bytes / self.fs + alpha * record_bytes / self.bs
        return drive / host

    def step_seconds(self, share: float, chosen: Chosen, code_bytes: int, record_bytes: int) -> float:
        """Seconds that a step takes for each cached token, where the host holds `share` of them.

        Both sides score at once; only then is anything chosen, and what was chosen is brought.
        """
        scoring = max(share * code_bytes / self.fc, (1 - share) * code_bytes / self.fs)
        moving = share * chosen.host / self.bc + (1 - share) * chosen.drive / self.bs
        return scoring + moving * record_bytes

    def host_share(self, chosen: Chosen, code_bytes: int, record_bytes: int) -> float:
        """The host's share of all tokens for which `step_seconds` is least.

        The time is linear on both sides of fc / (fc + fs), so it is least there (the paper's first version, beta =
        fc/fs), or at an end: all in memory where the drive's transfers cost more than the host's scoring.
        """
        shares = (1.0, self.fc / (self.fc + self.fs), 0.0)  # of equally good ones the largest
        return min(shares, key=lambda share: self.step_seconds(share, chosen, code_bytes, record_bytes))

    def save(self, path: Path, facts: list[str]) -> None:
        """Write as TOML, with the setting of the measurement as comments."""
        lines = [f"# {fact}" for fact in facts] + [f"{name} = {value:.4g}" for name, value in asdict(self).items()]
        files.write_text(path, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Speeds":
        try:
            values = tomllib.loads(Path(path).read_text())
            speeds = cls(**{name: float(values[name]) for name in cls.__dataclass_fields__})
        except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"{path} is no profile ({error!r}); make one with: hillinfer profile --out {path}"
            ) from None
        if not all(0 < speed < math.inf for speed in asdict(speeds).values()):
            raise UsageError(f"{path} has a speed that is no number above zero; measure again with: hillinfer profile")
        return speeds
