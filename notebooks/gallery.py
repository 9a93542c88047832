"""Run the notebooks and write docs/gallery: their text, code and outputs as Markdown, figures as pictures.

`python notebooks/gallery.py [NAME ...]`. It needs Chromium, for the pictures. Nothing in the result needs JavaScript.
"""

import base64
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly.io
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from sync import HERE, sources

GALLERY = HERE.parent / "docs" / "gallery"
WIDGET, PLOTLY = "application/vnd.jupyter.widget-view+json", "application/vnd.plotly.v1+json"
BOARDS = """
import ipywidgets
from hillinfer.workbench.accuracy import ScoreTable
from hillinfer.workbench.attention import AttentionView
from hillinfer.workbench.board import Board
def _boards(widget):
    drawn = isinstance(widget, AttentionView | Board | ScoreTable)
    return [widget] if drawn else [b for c in getattr(widget, "children", ()) for b in _boards(c)]
for number, board in enumerate(_boards(ipywidgets.Widget.widgets["MODEL"])):
    open("FOLDER/MODEL-%d-%s.html" % (number, type(board).__name__), "w").write(board.html())
"""


def shoot(pages: list[Path]) -> bytes:
    """A picture of boards in Chromium: side by side, or below a table of scores."""
    from playwright.sync_api import sync_playwright

    scores = "ScoreTable" in pages[0].name
    beside = len(pages) > 1 and not scores
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        tab = browser.new_page(
            viewport=dict(width=640 if beside else 1200 if scores else 1060, height=400), color_scheme="light"
        )
        images = []
        for page in pages:
            tab.goto(f"file://{page}")
            tab.wait_for_function("() => window.hillinferPainted")
            tab.wait_for_timeout(800)
            images.append(tab.locator(".hi-board").screenshot())
        if len(images) > 1:
            tab.set_viewport_size(dict(width=1300, height=400))
            urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
            way = "row" if beside else "column"
            style = f"display:flex;flex-direction:{way};align-items:flex-start;gap:8px;width:max-content"
            tab.set_content(f"<div id=all style='{style}'>" + "".join(f"<img src='{url}'>" for url in urls))
            images = [tab.locator("#all").screenshot()]
        browser.close()
    return images[0]


def execute(source: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; boards and plotly figures have become PNGs."""
    book = nbformat.read(source.with_suffix(".ipynb"), 4)
    book.metadata.language_info = {"name": "python"}
    client = NotebookClient(book, timeout=600, kernel_name="python3", store_widget_state=False)
    with client.setup_kernel(cwd=str(HERE)):
        for index, cell in enumerate(book.cells):
            if cell.cell_type == "code":
                client.execute_cell(cell, index)
        for cell in book.cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if WIDGET in data:
                    model = data.pop(WIDGET)["model_id"]
                    code = BOARDS.replace("MODEL", model).replace("FOLDER", str(folder))
                    first = book.cells[0]
                    client.execute_cell(nbformat.v4.new_code_cell(code), 0, store_history=False)
                    book.cells[0] = first  # its place was taken
                    data["image/png"] = base64.b64encode(shoot(sorted(folder.glob(f"{model}-*.html")))).decode()
                elif PLOTLY in data:
                    figure = plotly.io.from_json(plotly.io.json.to_json_plotly(data.pop(PLOTLY)), skip_invalid=True)
                    data["image/png"] = base64.b64encode(figure.to_image("png", width=1000)).decode()
                if "image/png" in data:
                    data.pop("text/html", None)
                    data.pop("text/plain", None)
    return book


def main() -> None:
    GALLERY.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:]
    for source in sources():
        if wanted and source.stem not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            book = execute(source, Path(folder))
        text, resources = MarkdownExporter().from_notebook_node(book)
        for old in GALLERY.glob(f"{source.stem}*"):
            old.unlink()
        for name, data in resources["outputs"].items():
            (GALLERY / f"{source.stem}_{name}").write_bytes(data)
            text = text.replace(f"]({name})", f"]({source.stem}_{name})")
        text = re.sub(r"<style.*?</style>", "", text, flags=re.S)  # GitHub would show it as text
        text = "\n".join(line.rstrip() for line in text.split("\n")).replace("![png]", "![what the cell shows]")
        (GALLERY / f"{source.stem}.md").write_text(text)
        print(source.stem, f"{len(resources['outputs'])} pictures", flush=True)
    index = ["# Gallery", "", "The notebooks with their outputs.", ""]
    index[2] += " Times are those of one machine at one moment, whatever else it did; `make gallery` makes them anew."
    for source in sources():
        title = next(line for line in source.read_text().split("\n") if line.startswith("# # "))[4:]
        index.append(f"- [{title}]({source.stem}.md) (`notebooks/{source.stem}.ipynb`)")
    (GALLERY / "README.md").write_text("\n".join(index) + "\n")


if __name__ == "__main__":
    main()
