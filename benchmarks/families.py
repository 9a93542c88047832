"""Every decoder family of the installed transformers, with every system: docs/families.md.

    python -m benchmarks.families                 # all that have no result in out/families yet, then the page
    python -m benchmarks.families llama gemma3    # these, again
    python -m benchmarks.families WRONG CRASH     # those whose last result was of these classes, again

Tiny random models in float32, a process each. The checks are in `benchmarks.family_checks`, the sizes in families.toml.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers

from benchmarks.family_checks import EXACT, SELECTIVE, check
from benchmarks.tiny_models import names

OUT = Path("out/families")
MEMORY = 12 << 30  # address space of one family's process
GROUPS = (("exact", "1"), ("selective", "0.2"))
CLASSES = ("equal", "refused", "not tested", "WRONG", "CRASH")


def run_family(name: str, path: Path) -> None:
    """A child process: the family's outcome as JSON, written again after each system."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    save(path, check(name, save=lambda outcome: save(path, outcome)))


def save(path: Path, outcome: dict) -> None:
    """Replace the file at once: the process may be killed at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    part.replace(path)


def sweep(chosen: list[str], jobs: int, limit: float) -> None:
    """Run the families, `jobs` at a time, each in a process of its own that ends after `limit` seconds."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once, here
    waiting, running, started = list(chosen), {}, time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            path = OUT / f"{waiting[0]}.json"
            child = context.Process(target=run_family, args=(waiting.pop(0), path))
            child.start()
            running[child.sentinel] = child, path, time.monotonic() + limit
        wait(list(running), timeout=1)
        for sentinel, (child, path, until) in list(running.items()):
            late = time.monotonic() > until
            if child.is_alive() and not late:
                continue
            child.kill()
            child.join()
            del running[sentinel]
            outcome = json.loads(path.read_text(encoding="utf-8"))
            if outcome["stage"] != "done":
                outcome["ended"] = f"{f'after {limit:g} s' if late else f'exit code {child.exitcode}'}"
                save(path, outcome)
            took = f"{time.monotonic() - started:6.0f} s, {len(waiting)} to go"
            print(f"{took:24} {path.stem:28} {' '.join(verdict(outcome))}"[:200], flush=True)


def results() -> dict[str, dict]:
    """The last outcomes by family, without those that an interrupted sweep left unfinished."""
    outcomes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(OUT.glob("*.json"))]
    return {found["family"]: found for found in outcomes if found["stage"] == "done" or "ended" in found}


def verdict(outcome: dict) -> tuple[str, str]:
    """A family's class, and why."""
    runs = [(f"{system} at {alpha}", run) for group, alpha in GROUPS for system, run in outcome[group].items()]
    if "untested" in outcome:
        return "not tested", outcome["untested"]
    if outcome["stage"] != "done" and outcome["stage"] == "reference":
        return "not tested", f"transformers alone: ended {outcome['ended']}"
    faults = group_by_text([(name, fault) for name, run in runs for fault in run["faults"]])
    if outcome["stage"] != "done":
        faults.append(f"{outcome['stage']}: ended {outcome['ended']}")
    if faults:
        return "WRONG" if any("WRONG" in fault for fault in faults) else "CRASH", "; ".join(faults)
    refused = group_by_text([(name, run["refused"]) for name, run in runs if "refused" in run])
    return "refused" if all("refused" in run for run in outcome["exact"].values()) else "equal", "; ".join(refused)


def group_by_text(texts: list[tuple[str, str]]) -> list[str]:
    """Each text once, with the systems that said it."""
    systems: dict[str, list[str]] = {}
    for system, text in texts:
        systems.setdefault(text, []).append(system)
    exact = [f"{name} at 1" for name in EXACT]
    selective = [f"{name} at 0.2" for name in SELECTIVE]
    groups = {"all": exact + selective, "at 1": exact, "at 0.2": selective}
    short = {tuple(names): group for group, names in groups.items()}
    return [f"{text} ({short.get(tuple(names), ', '.join(names))})" for text, names in systems.items()]


def row(outcome: dict) -> list[str]:
    """One family's cells of the table."""
    kind, why = verdict(outcome)
    exact, selective = outcome["exact"], outcome["selective"]
    good = [name for name, run in exact.items() if not run["faults"] and "refused" not in run]
    ran = [name for name, run in selective.items() if not run["faults"] and "refused" not in run]
    worst = max((value for run in exact.values() for value in run["difference"].values()), default=None)
    cells = [outcome["family"], outcome.get("kinds", ""), kind]
    cells += ["all" if len(good) == len(exact) else ", ".join(good)] if exact else [""]
    cells += [f"{len(ran)} of {len(selective)}"] if selective else [""]
    missing = ", ".join(outcome.get("unable", ()))
    notes = [why] if why else []
    notes += [f"transformers cannot: {missing}"] if missing else []
    return cells + ["" if worst is None else f"{worst:.0e}", "; ".join(notes).replace("|", "/")[:400]]


def write(path: Path) -> None:
    """The page, of all results there are."""
    outcomes = results()
    classes = {name: verdict(outcome)[0] for name, outcome in outcomes.items()}
    count = {False: Counter(), True: Counter()}
    for name, kind in classes.items():
        count["@" in name][kind] += 1
    counts = [[kind, f"{count[False][kind]}", f"{count[True][kind]}"] for kind in CLASSES]
    refused = [[run.get("refused") for run in outcome["selective"].values()] for outcome in outcomes.values()]
    exact_only = sum(kind == "equal" and all(reasons) for kind, reasons in zip(classes.values(), refused, strict=True))
    worst_first = sorted(outcomes, key=lambda name: (-CLASSES.index(classes[name]), name))
    page = PAGE.format(
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
        counts=table(["class", "families", "variants"], counts),
        exact_only=exact_only,
        families=table(
            ["family", "layers", "class", "exact", "at 0.2", "largest difference", "notes"],
            [row(outcomes[name]) for name in worst_first],
        ),
    )
    path.write_text(page, encoding="utf-8")
    print("\n".join(" ".join(cells) for cells in counts))


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


PAGE = """# Families

Every decoder family of {versions}, measured by `make families`, which writes this page:
tiny random models in float32, text only, each with every system.

{counts}

- **equal**: at alpha 1, `full`, `flexgen`, `dualblade` and `hillinfer` (from the drive, looking ahead) give the logits
  of transformers' own cache within 1e-4 in a prefill of 200 tokens, 24 steps, a second turn of 16, 4 more steps, and 4
  after a crop of 18; the same 24 greedy tokens; and the logits of a left-padded batch of two. At alpha 0.2 the nine
  selective systems run. A system that cannot refuses in one line before anything runs, and is then named in the notes;
  {exact_only} families and variants are equal at alpha 1 and allow no selection.
- **refused**: no system takes the family, and each says so in one line before anything runs.
- **not tested**: transformers itself cannot build or run the tiny model from text alone.
- **WRONG**: other logits or tokens. **CRASH**: a traceback, a refusal in mid-run, or a `plan` (what `hillinfer run`
  asks first) that fails or disagrees with the run.

Layers: F full attention, S sliding window, L linear attention, state space or convolution, I indexed, H and h both
attention (full, sliding) and state, _ none, ? a class of the model's own. F is tiered; the others keep transformers'
own cache. An @ names a variant of a family (benchmarks/families.toml). Configs are shrunk ones: a release that sets
another field may behave otherwise.

{families}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families to run again, or classes of results such as CRASH")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one family")
    parser.add_argument("--page", type=Path, default=Path("docs/families.md"))
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    last = {name: verdict(outcome)[0] for name, outcome in results().items()}
    known = names()
    if unknown := set(args.names) - {*known, *CLASSES}:
        parser.error(f"no family {', '.join(sorted(unknown))}")
    named = [name for name in args.names if name in known] + [name for name in known if last.get(name) in args.names]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = [*dict.fromkeys(named)] if args.names else [name for name in known if name not in last]
    sweep(chosen, args.jobs, args.limit)
    write(args.page)
    return int(any(verdict(outcome)[0] in ("WRONG", "CRASH") for outcome in results().values()))


if __name__ == "__main__":
    sys.exit(main())
