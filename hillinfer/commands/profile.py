"""`hillinfer profile`: how fast this machine scores and moves KV."""

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.commands.console import err, out
from hillinfer.config import check_folder


def profile(
    drive: Annotated[Path, typer.Option(help="Folder on the drive to measure.")],
    paced: Annotated[bool, typer.Option(help="Hold the emulated drive to a SmartSSD's rates.")] = False,
    out_file: Annotated[Path, typer.Option("--out", help="Where to write the profile.")] = Path("out/profile.toml"),
    device: Annotated[bool, typer.Option(help="Also what replay needs: this-machine.toml, in some minutes.")] = True,
):
    """Measure how fast host and drive score and move KV here; for --profile, and to see what would balance."""
    folder = check_folder(drive)
    from hillinfer.assets import machine
    from hillinfer.systems.hillinfer.balance import Chosen
    from hillinfer.whatif.calibrate import calibrate
    from hillinfer.whatif.speeds import CHOSEN, DIM, HEADS, measure

    speeds, facts = measure(folder, paced)
    facts.append(f"measured on {machine()}" + (", the drive paced to a SmartSSD's rates" if paced else ""))
    speeds.save(out_file, facts)
    for fact in facts:
        out.print(fact, soft_wrap=True, highlight=False)
    code, record = HEADS * DIM, 4 * HEADS * DIM
    for alpha in (0.1, 0.2):
        beta, share = speeds.beta(alpha, code, record), speeds.host_share(Chosen(alpha, alpha), code, record)
        out.print(
            f"at alpha {alpha} a step is shortest when the host holds {share:.0%} of the tokens; "
            f"by the paper's closed form {beta / (1 + beta):.0%}"
        )
    out.print(f"profile: {out_file} (records chosen at random: {CHOSEN:.0%})")
    if device:
        with err.status("what each kind of work costs here ...") as status:
            own = calibrate(folder, lambda what: status.update(f"what each kind of work costs here: {what}"))
        out.print(f"for hillinfer replay --profile this-machine: {own.save(out_file.parent / 'this-machine.toml')}")
