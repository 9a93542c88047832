"""`make show-replay`: measure or model all claims about profiles, replay and sweeps.

ROUNDS=n repeats the self-replay n times (3). The verdicts on the papers' headline figures are printed with their
reasons. They are results of the model, not claims of this project.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import Progress

from benchmarks import papers, self_replay
from benchmarks.claims import Claim, tests, verdict
from hillinfer.whatif import sweep
from hillinfer.whatif.devices import list_profiles

ROUNDS = int(os.environ.get("ROUNDS", 3))
CELLS = 1000


def predicted() -> Claim:
    with tempfile.TemporaryDirectory() as folder:
        frame = self_replay.measure(Path(folder), ROUNDS)
    print("\n" + frame.to_string(index=False, float_format="%.2f"))
    error = frame.error.abs().median()
    text = f"replay on this machine against measured steps, {len(frame)} cells, median of |error|"
    return Claim(text, f"{error:.1%}", "15%", error <= 0.15).show()


def hillinfer_shapes() -> list[Claim]:
    """The gain over the token-level baseline, at the smallest M0 of the sweep; modelled."""
    frame = papers.gains()
    small = frame[frame.M0.min() == frame.M0]
    gain = small["gain over h2o-like"]
    fits, spilled = gain[small.KV <= small.M0], gain[(small.KV > small.M0) & (small["codes in DRAM"] == 1)]
    overflow = gain[small["codes in DRAM"] < 1]
    print(
        f"fact   | where codes overflow the drive's DRAM the gain falls to {overflow.min():.2f}..{overflow.max():.2f}"
    )
    one = small[small.context == 4096].set_index("batch")["gain over h2o-like"]
    short = small[(small.context == 2048) & (small.batch == 1)]["gain over h2o-like"].iloc[0]
    balance = papers.balance()
    paper, barrier = balance.share[balance.paper.idxmin()], balance.share[balance.barrier.idxmin()]
    where = f"modelled: {papers.SMART}, M0 {small.M0.iloc[0]:.0f} GiB"
    return [
        Claim(f"gain with context, least beyond M0 against best within ({where})",
              f"{spilled.min():.2f} against {fits.max():.2f}", "larger", spilled.min() > fits.max()).show(),
        Claim(f"gain with batch at 4,096 tokens, 4 against 1 ({where})", f"{one[4]:.2f} against {one[1]:.2f}",
              "larger", one[4] > one[1]).show(),
        Claim(f"gain at 2,048 tokens ({where})", f"{short:.2f}", "about 2: 1.5 to 3", 1.5 <= short <= 3).show(),
        Claim("the paper's step is shortest at its beta", f"{paper:.2f}, predicted {balance.own[0]:.2f}",
              "within 0.05", abs(paper - balance.own[0]) <= 0.05).show(),
        Claim("a step that selects after both have scored, at this project's share",
              f"{barrier:.2f}, predicted {balance.own[0]:.2f}", "within 0.05",
              abs(barrier - balance.own[0]) <= 0.05).show(),
    ]  # fmt: skip


def leoam_shapes() -> list[Claim]:
    frame = papers.transfer_bound().set_index(["context", "system"])
    streamed, leoam = frame.ratio[2048, "flexgen"], frame.ratio[2048, "leoam"]
    share = frame["scoring bytes of the KV"][2048, "leoam"]
    print(f"fact   | LeoAM's transfer is still {leoam:.1f} times its compute at 2,048 tokens, and more beyond:")
    print("       | nearer to compute-bound, not there (the paper's step without it: 290 ms against 100)")
    return [
        Claim(f"transfer over compute at 2,048 tokens, LeoAM against streaming (modelled: {papers.PLAIN})",
              f"{leoam:.1f} against {streamed:.1f}", "less than half", leoam < streamed / 2).show(),
        Claim("LeoAM's drive bytes for scoring, of the KV", f"{share:.1%}", "at most 1/16", share <= 1 / 16).show(),
    ]  # fmt: skip


def dualblade_shapes() -> list[Claim]:
    frame = papers.page_cache_collapse()
    short, ample = frame[frame.hit == 0], frame[frame.hit == 1]
    best = frame[["page cache", "direct"]].min(axis=1)
    jump = short["page cache"].min() / ample["page cache"].max()
    print(f"fact   | the hit rate is 0 up to a cap of {short.cap.max()} GiB and 1 from {ample.cap.min()} on, by rule")
    return [
        Claim(f"page cache below the working set, step against one that fits (modelled: {papers.EDGE})", f"{jump:.1f}x",
              "1.5x longer", jump >= 1.5).show(),
        Claim("dual against the better single path, worst cap", f"{(frame.dual / best).max():.3f}", "1",
              (frame.dual / best).max() <= 1 + 1e-9).show(),
        Claim("cut where all KV fits", f"{ample.cut.abs().max():.1%}", "0", ample.cut.abs().max() < 1e-9).show(),
        Claim("direct alone where memory is ample, against the page cache",
              f"{(ample['direct'] / ample['page cache']).min():.1f}x", "slower",
              bool((ample["direct"] > ample["page cache"]).all())).show(),
    ]  # fmt: skip


def headlines() -> Claim:
    papers.main()
    frame = papers.headlines()
    good = frame.verdict.isin(["reached", "not reached"]) & (frame.why.str.len() > 0)
    return Claim("headline figures with verdict, place, profile and reason", f"{good.sum()} of {len(frame)}", "all",
                 bool(good.all())).show()  # fmt: skip


def awkward() -> list[Claim]:
    frame = papers.awkward_truth()
    print(frame.drop(columns="profile").to_string(index=False, float_format="%.2f"))
    scanned = frame[frame.winner != "none"]
    fits = scanned["codes GiB"] <= 4e9 / papers.GIB
    times = (scanned["card, keys on NAND"] / scanned["Gen4, keys to host"]).min()
    return [
        Claim("keys scanned on the card's NAND against a plain Gen4 drive (modelled)", f"{times:.2f}x as long",
              "1.9x or more", times >= 1.9).show(),
        Claim("the card scores fastest where its DRAM holds the codes", f"{fits.sum()} of {fits.sum()} such cells"
              if (scanned.winner[fits] == "card, codes in DRAM").all() else "not in all", "all, and none beyond",
              bool(fits.any() and (scanned.winner[fits] == "card, codes in DRAM").all()
                   and (scanned.winner[~fits] != "card, codes in DRAM").all())).show(),
    ]  # fmt: skip


def sweeps() -> Claim:
    names = list_profiles()[:-1]
    cells = sweep.cells(names, ["llama-3.1-8b", "opt-6.7b"], ["all"], sweep.parse_sizes("4k..128k"), [1, 8])[:CELLS]
    start = time.monotonic()
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{len(cells)} cells", total=len(cells))
        frame = sweep.sweep(cells, 2, done=lambda count: progress.update(bar, completed=count))
    took = time.monotonic() - start
    text = f"a sweep of {len(frame)} cells with two processes ({frame.ms.notna().sum()} fit)"
    return Claim(text, f"{took:.0f} s", "300 s", took < 300 and len(frame) == CELLS).show()


def main() -> int:
    pd.set_option("display.width", 200)
    found = [
        tests("the engine by hand; capacity and work are conserved", "tests/test_engine.py").show(),
        tests("replays by hand; bytes conserved; scaling as stated; a faster part is never slower",
              "tests/test_replay.py").show(),
        tests("rules keep bytes and lanes; faster is never slower", "tests/test_modelled.py").show(),
        tests("profiles: every number has its source, bad ones are refused", "tests/test_devices.py").show(),
        predicted(),
        *hillinfer_shapes(),
        *leoam_shapes(),
        *dualblade_shapes(),
        *awkward(),
        headlines(),
        sweeps(),
    ]  # fmt: skip
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main())
