"""The part of `make show-trust` about sessions, security, concurrency, broken input and long use.

KILLS, CASES and RUNS set the number of trials (200, 1,000,000 and 1,000).
"""

import os

from transformers.utils import logging

from benchmarks import fuzz, kills, reopen, soak
from benchmarks.claims import Claim, tests

KILLS, CASES, RUNS = (int(os.environ.get(name, n)) for name, n in (("KILLS", 200), ("CASES", 10**6), ("RUNS", 1000)))


def reopened() -> list[Claim]:
    claims = []
    for system, row in reopen.measure(("full", "topk", "hillinfer")).items():
        text = (
            f"a session of {row['n']:,} tokens ({row['bytes'] / 2**20:.0f} MiB, the embedded model, "
            f"{os.cpu_count()} cores) "
            f"opens under {system} in {row['warm']:.3f} s ({row['cold']:.3f} s from the disk), the prefill takes "
            f"{row['prefill']:.2f} s"
        )
        ratio = row["prefill"] / row["warm"]
        claims.append(Claim(text, f"{ratio:.0f} x faster", "20 x", ratio >= 20).show())
    return claims


def killed() -> list[Claim]:
    found = kills.run(KILLS)
    text = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
    sure = sum(found[f"killed while {what}"] for what in ("saving", "generating"))
    right = found["wrong"] == 0 and found["refused though one was there"] == 0
    left = found["orphans left"]
    return [
        Claim("what a later open gives after SIGKILL", text, "old, new or a refusal; never wrong", right).show(),
        Claim("processes killed in their work", f"{sure} of {KILLS}", "80 %", sure >= 0.8 * KILLS).show(),
        Claim("scratch files after the next start", f"{left} of {found['orphans']}", "0", left == 0).show(),
    ]


def readers() -> Claim:
    agreed, count = kills.readers(8)
    text = "processes that open one session at once and answer as a fresh prefill does"
    return Claim(text, f"{agreed} of {count}", "all", agreed == count).show()


def fuzzed() -> list[Claim]:
    found = fuzz.run(CASES, report=lambda text: None)
    claims = [
        Claim(
            f"broken input for {parser.name}: {parser.taken:,} taken, {parser.refused:,} refused as stated",
            f"{len(parser.failures)} crashes or hangs",
            "0",
            not parser.failures,
        ).show()
        for parser in found
    ]
    total = sum(parser.taken + parser.refused for parser in found)
    return [*claims, Claim("broken inputs in all", f"{total:,}", f"{CASES:,}", total >= 0.999 * CASES).show()]


def soaked() -> list[Claim]:
    soaked = soak.soak(RUNS)
    text = f"{soaked.runs:,} random generations, {soaked.stopped} broken off, {soaked.reopened} through a session"
    (threads, last_threads), (descriptors, last_descriptors) = soaked.threads, soaked.descriptors
    grown = max(last_threads - threads, last_descriptors - descriptors)
    return [
        Claim(text, f"{soaked.growth:+.2%} resident memory", "within 2 %", abs(soaked.growth) <= 0.02).show(),
        Claim(
            "threads and descriptors, after the warm-up and at the end",
            f"{threads} and {descriptors}, {last_threads} and {last_descriptors}",
            "no growth",
            grown <= 0,
        ).show(),
        Claim(
            f"of {soaked.compared} exact ones, other tokens than the full cache's; files left",
            f"{len(soaked.wrong)}; {len(soaked.left)}",
            "0; 0",
            not soaked.wrong and not soaked.left,
        ).show(),
    ]


def claims() -> list[Claim]:
    logging.disable_progress_bar()
    return [
        *killed(),  # first: it forks, and must do so before there are threads
        readers(),
        tests(
            "sessions: answers of a fresh prefill; what is no whole session is refused", "tests/test_session.py"
        ).show(),
        tests("security: no code from data, private files, no links, hostile pages", "tests/test_security.py").show(),
        tests("two caches, two models, threads, a fork: right or refused", "tests/test_concurrency.py").show(),
        tests("any order of operations equals plain tensors", "-m", "", "tests/test_state_machine.py").show(),
        *reopened(),
        *fuzzed(),
        *soaked(),
    ]
