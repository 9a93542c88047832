"""`hillinfer profile`: measure this machine and write its device profile."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import say, working
from hillinfer.config import check_folder


def profile(
    drive: Annotated[Path, typer.Option(help="Folder on the drive to measure.")],
    paced: Annotated[bool, typer.Option(help="Pace the emulated drive to a SmartSSD's rates.")] = False,
    out_file: Annotated[Path, typer.Option("--out", help="The profile to write.")] = Path("out/this-machine.toml"),
    device: Annotated[bool, typer.Option(help="Also measure each kind of work, for replay; takes minutes.")] = True,
):
    """Measure this machine: its device profile, for `run --profile FILE` and `replay --profile this-machine`."""
    from hillinfer.systems.hillinfer.balance import SelectionRates
    from hillinfer.systems.hillinfer.profile import check_replaceable

    folder = check_folder(drive)
    check_replaceable(out_file)
    from hillinfer.whatif.calibrate import calibrate
    from hillinfer.whatif.measure import DIM, HEADS, RECORD_BYTES, SELECTED

    with working("measuring") as tell:
        found = calibrate(folder, paced, device, lambda text: tell(f"measuring: {text}"))
    found.save(out_file)
    works = {"cpu.score": "host scores key codes", "emulated.score": "drive scores key codes"}
    works |= {"cpu.gather": "host gathers records", "emulated.fetch": "drive fetches records"}
    for path, text in works.items():
        part, number = path.split(".")
        rate = found.parts[part][number]
        say(f"{path}: {text}, {rate.at() / 1e9:.2f} GB/s ({rate.source})")
    say(f"measured on {found.about}; records selected at random: {SELECTED:.0%}")
    speeds, code = found.speeds(RECORD_BYTES), HEADS * DIM
    for alpha in (0.1, 0.2):
        beta, rates = speeds.beta(alpha, code, RECORD_BYTES), SelectionRates(alpha, alpha)
        share, paper = speeds.host_share(rates, code, RECORD_BYTES), beta / (1 + beta)
        say(f"alpha {alpha}: a step is shortest with {share:.0%} of the tokens on the host (closed form: {paper:.0%})")
    say(f"profile: {out_file}")
