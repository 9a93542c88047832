"""The package outside of its clone: what a wheel holds, and that it runs where little is as expected."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hillinfer
from tests.test_project import ROOT, imports

pytest.importorskip("hatchling")

ASKED = """
import sys, hillinfer, torch
from hillinfer import native
from hillinfer.assets import data_folder, load_embedded
model, tokenizer = load_embedded()
ids = tokenizer("The box of Anna holds a red key. " * 20, return_tensors="pt").input_ids
with hillinfer.make_cache(model, "hillinfer", alpha=0.2, drive=sys.argv[1]) as cache:
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
print(ascii([hillinfer.__file__, str(data_folder("notebooks")), native.available(), out[0, -4:].tolist()]))
"""


def build(target: Path, *kinds: str, root: Path = ROOT) -> list[Path]:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target)]
    for kind in kinds:
        subprocess.run([*command, "-t", kind], cwd=root, check=True, capture_output=True)
    return sorted(target.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    build(target, "wheel", "sdist")
    return target


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The wheel alone, in a folder whose name has a space and an umlaut; its dependencies are this environment's."""
    target = tmp_path_factory.mktemp("ohne Übersetzer") / "Pakete"
    wheel = next(built.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return target


def test_a_wheel_is_the_same_at_each_build_also_from_the_sdist(built, tmp_path):
    wheel, sdist = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / "again", "wheel", root=next(tmp_path.iterdir()))
    assert [path.name for path in again] == [wheel.name]
    assert again[0].read_bytes() == wheel.read_bytes()
    assert wheel.name.startswith(f"hillinfer-{hillinfer.__version__}-py3-none-any")


def test_a_wheel_holds_all_that_runs_and_nothing_else(built):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hillinfer").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    assert sources <= set(names)
    for name in ("model/model.safetensors", "model/README.md", "tasks/needle_1k.jsonl", "text/persuasion.txt"):
        assert f"hillinfer/_data/{name}" in names
    notebooks = {f"hillinfer/_data/notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hillinfer"}


def test_every_dependency_is_imported_and_no_other_is_needed():
    """What an extra brings is imported where it is used; so are pyxrt and ray, which come with a card or cluster."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(line).name for line in project["dependencies"]}
    used = {name.split(".")[0] for path in (ROOT / "hillinfer").rglob("*.py") for name in imports(path)}
    assert needed <= used
    extra = {Requirement(line).name.lower() for lines in project["optional-dependencies"].values() for line in lines}
    carried = {"huggingface_hub", "safetensors", "tokenizers", "click", "pydantic", "IPython", "traitlets"}  # by those
    rest = used - set(sys.stdlib_module_names) - needed - carried - {"hillinfer", "pyxrt", "ray"}
    assert {name.lower() for name in rest} <= extra


PLACES = {
    "as it comes": {},
    "no compiler": {"PATH": "/nowhere", "CC": None},
    "a home that cannot be written to": {"HOME": "/proc", "XDG_CACHE_HOME": None, "HF_HOME": None},
    "no home": {"HOME": None, "XDG_CACHE_HOME": None, "HF_HOME": None, "USER": None},
    "the C locale": {"LC_ALL": "C"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("place", PLACES)
def test_the_wheel_answers(installed, tmp_path, place):
    if place == "ASCII":  # the tokenizers library takes file names as UTF-8 only
        installed = shutil.copytree(installed, tmp_path / "wheel")
    environment = dict(os.environ) | {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path), **PLACES[place]}
    environment = {name: value for name, value in environment.items() if value is not None}
    drive = tmp_path / "ein Laufwerk für Schlüssel"
    drive.mkdir()
    command = [sys.executable, "-P", "-c", ASKED, drive]
    ran = subprocess.run(command, cwd=drive, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    where, notebooks, compiled, tokens = ast.literal_eval(ran.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(installed) and Path(notebooks).is_relative_to(installed)
    assert compiled == (place != "no compiler") and len(tokens) == 4
    assert not any(drive.iterdir())
