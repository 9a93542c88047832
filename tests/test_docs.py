"""The task pages work as pasted, and the architecture page and the API reference match the tree."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted((ROOT / "docs" / "how-to").glob("*.md")) if page.name != "README.md"]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_works_as_pasted(page, tmp_path, monkeypatch):
    """Python blocks one by one, each on its own; shell blocks line by line, in the same folder, where README.md is."""
    pytest.importorskip("ipywidgets", reason="pip install 'hillinfer[lab]'")
    import hillinfer

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    policies = dict(hillinfer.POLICIES)
    blocks = BLOCK.findall(page.read_text())
    assert blocks, "a page without anything to paste"
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
        else:
            for line in code.splitlines():
                paste(line)
    hillinfer.POLICIES.clear()
    hillinfer.POLICIES.update(policies)


def paste(line: str) -> None:
    """A line of shell; our own command in this process, where torch is loaded: seconds less."""
    from hillinfer.commands.app import app

    command, *words = shlex.split(line, comments=True) or [":"]
    if command == "hillinfer":
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    else:
        subprocess.run(["bash", "-c", line], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_is_one_screen_and_listed(page):
    assert page.read_text().startswith("# I want to ")
    assert len(page.read_text().splitlines()) <= 45
    assert f"({page.name})" in (ROOT / "docs" / "how-to" / "README.md").read_text()


def test_links_lead_somewhere():
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_the_diagram_names_the_tree():
    """Every part of the package is in the diagram, and nothing else is."""
    diagram = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.S)[1]
    named = set(re.findall(r"([a-z_]+(?:\.py|/))", diagram))
    package = ROOT / "hillinfer"
    there = {path.name for path in package.glob("*.py")} | {f"{d.name}/" for d in package.iterdir() if d.is_dir()}
    assert named == {name for name in there if not name.startswith("_")}


def test_api_reference_is_in_step():
    pytest.importorskip("ipywidgets", reason="pip install 'hillinfer[lab]'")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make_api
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == make_api.page(), "run: make api"
