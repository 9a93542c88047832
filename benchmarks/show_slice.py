"""`make show-slice`: measure all machine-checkable claims about the core.

FRESH=0 skips the fresh clone, which takes the longest.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.claims import ROOT, Claim, tests, verdict

QUESTIONS = {"lines_2k": 50, "needle_2k": 50, "lines_4k": 10}  # 2 points must be more than one answer


def fresh_clone() -> list[Claim]:
    """Clone, then the README's two commands, with an empty package cache."""
    claims = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "hillinfer"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        drop = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        env = {k: v for k, v in os.environ.items() if k not in drop} | {"PIP_NO_CACHE_DIR": "1"}
        spent = 0.0
        for target in ("demo", "test"):
            start = time.monotonic()
            done = subprocess.run(["make", target], cwd=clone, env=env, capture_output=True, text=True)
            spent += time.monotonic() - start
            good = done.returncode == 0 and (target == "test" or "dev/host/drv" in done.stdout)
            if not good:
                print(done.stdout[-2000:], done.stderr[-2000:])
            claims.append(Claim(f"make {target} on a fresh clone", f"exit {done.returncode}", "exit 0", good).show())
        claims.append(Claim("both, installation included", f"{spent:.0f} s", "600 s", spent < 600).show())
        again = subprocess.run(["make", "-n", "demo"], cwd=clone, env=env, capture_output=True, text=True).stdout
        claims.append(
            Claim(
                "a second make demo installs", f"{again.count('pip install')} packages", "0", "pip" not in again
            ).show()
        )
        left = list((clone / "out" / "demo" / "drive").iterdir())
        claims.append(Claim("files in the drive folder after the demo", str(len(left)), "0", not left).show())
    return claims


def answers() -> list[Claim]:
    """The demo's comparison on more of its questions."""
    from transformers.utils import logging

    from hillinfer.assets import load_embedded
    from hillinfer.longbench.comparison import SYSTEMS, compare, demo_records, floor
    from hillinfer.longbench.synthetic import facts_of

    logging.disable_progress_bar()
    model, tokenizer = load_embedded()
    records = demo_records(QUESTIONS)
    facts = min(len(facts_of(record)) for record in records)
    with tempfile.TemporaryDirectory() as drive:
        results = compare(model, tokenizer, records, SYSTEMS, {"alpha": 0.2, "drive": drive})
        left = list(Path(drive).iterdir())
    full, streaming, hill = results
    tokens, n = min(answer.prompt_tokens for answer in full.answers), len(records)
    share = hill.mean("attended") / hill.mean("cached")
    same = abs(streaming.mean("attended") - hill.mean("attended"))
    guess = floor(records)
    return [
        Claim("shortest prompt of the questions", f"{tokens} tokens", "1000", tokens >= 1000).show(),
        Claim("fewest facts in a document", f"{facts}", "10", facts >= 10).show(),
        Claim(
            "partial-key matcher, no model", f"{guess:.1%}", "well below full", guess < full.accuracy - 0.4
        ).show(),
        Claim(f"full answers right (n={n})", f"{full.accuracy:.1%}", "90%", full.accuracy >= 0.9).show(),
        Claim(
            f"hillinfer at alpha 0.2 answers right, attending to {share:.1%} of the tokens",
            f"{hill.accuracy:.1%}", "within 2 points of full", hill.accuracy >= full.accuracy - 0.02,
        ).show(),
        Claim(
            f"streaming with the same number of tokens (difference {same:.1f})",
            f"{streaming.accuracy:.1%}", "40 points below hillinfer", streaming.accuracy <= hill.accuracy - 0.4,
        ).show(),
        Claim("hillinfer reads its cold pool", f"{hill.rate('drive'):.1%} of attended tokens", "above 5%",
              hill.rate("drive") > 0.05).show(),
        Claim("files in the drive folder after it", str(len(left)), "0", not left).show(),
    ]  # fmt: skip


def main() -> int:
    claims = [] if os.environ.get("FRESH") == "0" else fresh_clone()
    claims += [
        tests("generate equals DynamicCache (families, tiers, padding, chunks, turns, crop)", "tests/test_generate.py",
              "-k", "EqualsDynamicCache or beams_in_memory").show(),
        tests("every policy runs at alpha 0.1", "tests/test_generate.py", "-k", "tenth").show(),
        tests("beams are refused on the drive; other attention raises", "tests/test_generate.py",
              "-k", "refused or another").show(),
        tests("integer scores equal the numpy reference exactly", "tests/test_codes.py").show(),
        tests("bad input: one line, exit code 2; Ctrl-C, full disk leave nothing", "tests/test_cli.py").show(),
        tests("drives read back to the bit and leave nothing", "tests/test_drive.py").show(),
        tests("a new policy is one file under 60 lines and one registry line", "tests/test_policy.py").show(),
    ]  # fmt: skip
    return verdict(claims + answers())


if __name__ == "__main__":
    sys.exit(main())
