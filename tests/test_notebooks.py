"""Every notebook runs from top to bottom without a browser, and is committed without outputs."""

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'hillinfer[lab]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'hillinfer[lab]'")
KernelManager = pytest.importorskip("jupyter_client", reason="pip install 'hillinfer[lab]'").KernelManager
pytest.importorskip("ipywidgets")

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Smaller parameters than a reader's: every cell still runs.
SMALL = dict.fromkeys(("00", "01", "02", "03", "06"), 'task, tokens = "lines", 1024')  # short answers
SMALL |= {"04": 'tasks, systems = {"lines_1k": 1}, ["full", "topk", "hillinfer"]', "05": 'tasks = {"lines_1k": 1}'}
SMALL |= {
    "07": 'task, length = "lines", 1024',
    "08": 'tasks, systems, alphas, samples = ["lines_1k"], ["streaming", "hillinfer"], "0.2", 1',
}


def test_all_notebooks_are_here():
    assert [book.stem[:2] for book in BOOKS] == [f"{number:02}" for number in range(12)]
    assert [book.stem for book in BOOKS] == [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*_*.py"))]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_committed_form(path):
    book = nbformat.read(path, 4)
    assert path.stat().st_size < 1e6
    assert "widgets" not in book.metadata and book.metadata.kernelspec.name == "python3"
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert [("parameters" in cell.metadata.get("tags", [])) for cell in code].count(True) == 1
    assert "parameters" in code[0].metadata.tags
    first, last = book.cells[0].source, book.cells[-1].source
    assert first.startswith("# ") and "**What you will see:**" in first
    assert "your own model" in last or "your own" in last


def test_ipynb_is_its_source():
    pytest.importorskip("jupytext")
    sys.path.insert(0, str(ROOT / "notebooks"))
    try:
        import sync
    finally:
        sys.path.pop(0)
    for source in sync.sources():
        assert source.with_suffix(".ipynb").read_text() == sync.stripped(source), "run: python notebooks/sync.py"


def code_of(cell) -> list[str]:
    return cell.source.splitlines() if cell.cell_type == "code" else []


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_gallery_shows_all_of_it(path):
    page, book = (ROOT / "docs" / "gallery" / f"{path.stem}.md").read_text(), nbformat.read(path, 4)
    shown = "\n".join(line.rstrip() for line in page.split("\n"))
    for cell in book.cells:
        assert "\n".join(line.rstrip() for line in cell.source.split("\n")) in shown
    assert "\x1b" not in page and len(page) < 1e6  # escape codes of a terminal
    assert not any(line.lstrip().startswith(("!", "%")) for cell in book.cells for line in code_of(cell))
    assert "Traceback" not in page and "Warning" not in page and page.startswith(book.cells[0].source.split("\n")[0])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks of this process: each would load torch again."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("TMPDIR", str(folder))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(folder))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel):
    book = nbformat.read(path, 4)
    place = next(i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
    book.cells[place].source += "\n" + SMALL.get(path.stem[:2], "")
    book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # no names of the notebook before
    client = nbclient.NotebookClient(book, kernel, timeout=300, store_widget_state=False)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    printed = [out.text for cell in book.cells for out in cell.get("outputs", []) if out.output_type == "stream"]
    assert not any("Traceback" in text for text in printed)
    shown = [key for cell in book.cells for out in cell.get("outputs", []) for key in out.get("data", {})]
    assert any(key.startswith(("application/vnd.", "text/html")) for key in shown)  # something to look at
