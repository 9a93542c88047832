"""The device profiles that ship with the package, and the one of this machine."""

from importlib import resources
from pathlib import Path

from hillinfer.errors import UsageError
from hillinfer.systems.hillinfer.profile import MEASURE, OWN, THIS, Profile

FOLDER = resources.files("hillinfer.whatif") / "profiles"


def list_profiles() -> list[str]:
    """Names of the shipped profiles, and `this-machine`, which `hillinfer profile` writes."""
    return sorted(path.name.removesuffix(".toml") for path in FOLDER.iterdir() if path.name.endswith(".toml")) + [THIS]


def find_profile(name: str | Path, own: Path = OWN) -> Profile:
    """A shipped profile by name, a TOML file by path, or `this-machine` from the file `own`. UsageError if unknown."""
    if name == THIS and not own.exists():
        raise UsageError(f"{own} does not exist yet; {MEASURE}")
    if name == THIS or str(name).endswith(".toml"):
        return Profile.load(own if name == THIS else Path(name))
    if name not in list_profiles():
        raise UsageError(f"no profile '{name}'; choose {', '.join(list_profiles())}, or name a .toml file")
    with resources.as_file(FOLDER / f"{name}.toml") as path:
        return Profile.load(path)
