"""The project's own promises: versions in step, arrows one way, small modules, a policy in one file."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pins(path: str) -> dict[str, str]:
    return {
        m[1].lower().replace("_", "-"): m[2]
        for m in re.finditer(r"^\s*-?\s*([\w.-]+)==([\w.]+)\s*$", (ROOT / path).read_text(), re.M)
    }


def test_environment_and_constraints_are_in_step():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"] + extras["lab"] + extras["longbench"]
    }
    conda, pip = pins("environment.yml"), pins("constraints.txt")
    assert set(conda) == wanted
    assert {name: pip[name] for name in wanted} == conda
    assert {re.match(r"[\w.-]+", line)[0].lower() for line in extras["dev"]} <= set(pip)


# What each part may import of the others: arrows point one way (docs/design.md).
MAY = {
    "growable": set(),
    "files": set(),
    "native": set(),
    "config": {"files"},
    "tiers": {"files", "growable", "native"},
    "evaluator": {"growable", "native"},
    "pipeline": {"config", "files", "evaluator", "tiers", "native"},
    "attention": {"native"},
    "layer": {"attention", "config", "pipeline", "evaluator", "tiers", "native"},
    "cache": {"config", "layer", "attention", "pipeline", "evaluator", "tiers"},
    "systems": {"config", "cache", "evaluator"},
    "session": {"config", "cache", "systems", "tiers"},
    "assets": {"config"},
    "longbench": {"config", "files", "assets", "cache", "systems", "evaluator", "pipeline"},
    "workbench": {
        "assets",
        "files",
        "cache",
        "config",
        "demo",
        "evaluator",
        "longbench",
        "pipeline",
        "session",
        "systems",
    },
    "calibrate": {"cache", "demo", "pipeline", "systems", "tiers"},
    "replay_command": {"cli", "config", "pipeline", "workbench"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("part", MAY)
def test_arrows_point_one_way(part):
    home = ROOT / "hillinfer" / part
    for path in home.rglob("*.py") if home.is_dir() else [home.with_suffix(".py")]:
        used = {name.split(".")[1] for name in imports(path) if name.startswith("hillinfer.")}
        assert used <= MAY[part] | {part}, path


def test_only_the_seam_knows_transformers_internals():
    for path in (ROOT / "hillinfer").rglob("*.py"):
        deep = {name for name in imports(path) if name.startswith("transformers.")} - {"transformers.utils"}
        assert not deep or path.name == "cache.py", (path, deep)
        if path.parent.name in ("tiers", "evaluator", "policies", "pipeline") or path.name == "layer.py":
            assert not any(name.startswith("transformers") for name in imports(path)), path


def test_tracked_text_names_no_machine_paths():
    for path in [*ROOT.glob("*.md"), *(ROOT / "hillinfer").rglob("*.py"), *(ROOT / "data").glob("*.py")]:
        assert not re.search(r"/(root|home)/\w", path.read_text()), path
