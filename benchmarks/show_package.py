"""Every claim about the package that a stranger installs, measured again: python -m benchmarks.show_package

Builds the wheel, installs nothing but it into new environments, and uses it there, from an empty folder. Needs a
package index.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import Distribution, distributions
from pathlib import Path

from benchmarks.claims import ROOT, Claim, tests, verdict

PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
PERMISSIVE = (
    "apache",
    "mit",
    "bsd",
    "psf",
    "python software",
    "isc",
    "mpl",
    "mozilla",
    "unlicense",
    "0bsd",
    "zlib",
    "hpnd",
    "cc0",
)
PORT = 8917


def run(*command: str | Path, cwd: Path, code: int | None = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if code is not None and ran.returncode != code:
        raise RuntimeError(
            f"{' '.join(map(str, command))}: exit {ran.returncode}\n{ran.stdout[-800:]}{ran.stderr[-800:]}"
        )
    return ran.stdout + ran.stderr


def build(target: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target, cwd=ROOT)
    return next(target.glob("*.whl"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(python: str, folder: Path, what: str) -> Path:
    """A new environment with the wheel and what it needs. Its `bin`."""
    run(python, "-m", "venv", folder, cwd=ROOT)
    add(folder / "bin", what)
    return folder / "bin"


def add(where: Path, what: str) -> None:
    run(where / "pip", "install", "-q", "-c", ROOT / "constraints.txt", what, cwd=where)


def use(python: str, wheel: Path, place: Path) -> list[Claim]:
    """Install and demo, timed."""
    work, start = place / "empty", time.monotonic()
    work.mkdir(parents=True)
    try:
        where = install(python, place / "venv", str(wheel))
        installed = time.monotonic() - start
        shown = run(where / "hillinfer", "demo", cwd=work)
    except RuntimeError as error:
        return [Claim(f"{python}: install and demo", str(error).splitlines()[-1][:100], "runs", False).show()]
    took = time.monotonic() - start
    good = took < 180 and all(name in shown for name in ("full", "streaming", "hillinfer"))
    figure = f"{took:.0f} s, install {installed:.0f} s"
    return [Claim(f"{python}: the wheel in an empty environment, install and demo", figure, "180 s", good).show()]


def commands(wheel: Path, place: Path) -> list[Claim]:
    """`doctor`, `eval` and `lab` in the environment that `use` made."""
    where, work, claims = place / "venv/bin", place / "empty", []
    asked = ["eval", "--tasks", "needle_1k", "--samples", "1", "--systems", "full,hillinfer", "--alpha", "0.2"]
    for words, wanted in ((["doctor"], "torch"), (asked, "hillinfer"), (["systems"], "dualblade")):
        try:
            ok, figure = wanted in run(where / "hillinfer", *words, cwd=work), "runs"
        except RuntimeError as error:
            ok, figure = False, str(error).splitlines()[-1][:100]
        claims.append(Claim(f"`hillinfer {words[0]}` from the wheel", figure, "runs", ok).show())
    lacking = run(where / "hillinfer", "lab", "--no-browser", cwd=work, code=None)
    named = next((line for line in lacking.splitlines() if "hillinfer[lab]" in line), "no fix named")
    claims.append(Claim("`hillinfer lab` without its extra", named.strip()[:100], "names it", "[lab]" in named).show())
    required = sorted(distributions(path=[str(next((place / "venv/lib").glob("*/site-packages")))]), key=name_of)
    claims += licences(required)
    add(where, f"{wheel}[lab]")
    claims.append(lab(where, work).show())
    return claims


def lab(where: Path, work: Path) -> Claim:
    server = subprocess.Popen([where / "hillinfer", "lab", "--no-browser", "--port", str(PORT)], cwd=work,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    answer = "no answer"
    try:
        for _ in range(90):
            time.sleep(1)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api") as reply:
                    answer = reply.read().decode()
                break
            except OSError:
                continue
    finally:
        server.terminate()
        server.wait()
    return Claim("`hillinfer lab` from the wheel", answer[:60], "answers", "version" in answer)


def name_of(package: Distribution) -> str:
    return package.metadata["Name"].lower()


def licences(packages: list[Distribution]) -> list[Claim]:
    """What the wheel brings along, and under which licences."""
    odd, names = [], []
    for package in packages:
        about = package.metadata
        lines = [about.get("License-Expression"), about.get("License"), *about.get_all("Classifier", [])]
        stated = " ".join(
            line for line in lines if line and (not line.count("::") or line.startswith("License"))
        ).lower()
        names.append(name_of(package))
        if not any(word in stated for word in PERMISSIVE):
            odd.append(f"{name_of(package)}: {stated[:40] or 'not stated'}")
    print(f"{len(names)} packages with it: {', '.join(names)}", flush=True)
    figure = f"{len(names)} packages; {'; '.join(odd) or 'all permissive'}"
    return [Claim("licences of what is installed with it", figure, "permissive", not odd).show()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pythons", default=",".join(PYTHONS), help="interpreters to try, those that exist")
    parser.add_argument("--wheel", type=Path, help="a wheel that exists, to be tried instead of a new one")
    given = parser.parse_args()
    found = [name for name in given.pythons.split(",") if shutil.which(name) and works(name)]
    claims = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        wheel, again = given.wheel or build(place / "one"), build(place / "two")
        same = digest(wheel) == digest(again)
        claims.append(Claim("two builds of the wheel", digest(wheel)[:16], "the same hash", same).show())
        for number, python in enumerate(found):
            claims += use(python, wheel.resolve(), place / str(number))
            if not number:
                claims += commands(wheel.resolve(), place / str(number))
            shutil.rmtree(place / str(number))
    rest = sorted(set(given.pythons.split(",")) - set(found))
    print(f"not here: {', '.join(rest) or 'none'}", flush=True)
    claims.append(tests("no compiler, no home, odd locales and folders", "tests/test_package.py").show())
    ran = subprocess.run([sys.executable, "-m", "benchmarks.audit"], cwd=ROOT, capture_output=True, text=True)
    last = (ran.stdout.splitlines() or ["no answer"])[-1].partition(";")[0][:100]
    bar = "none, or argued in docs/package.md"
    claims.append(Claim("known vulnerabilities (`make audit`)", last, bar, ran.returncode == 0).show())
    return verdict(claims)


def works(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
