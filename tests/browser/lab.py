"""A real JupyterLab on loopback with a token, in a folder of its own, and a real Chromium to look at it."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": '{"fetchNews": "false"}',
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": '{"autosave": false}',
}
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

BOARD = ".hi-board:not(.hi-overlay)"  # not the chart below them


@contextmanager
def serve(folder: Path, dark: bool = False):
    """JupyterLab over `folder`; gives (address, token). It ends with the block."""
    home = folder / ".jupyter"
    for name, text in SETTINGS.items():
        path = home / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if dark:
        path = home / "settings" / "@jupyterlab/apputils-extension/themes.jupyterlab-settings"
        path.write_text('{"theme": "JupyterLab Dark"}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    own |= {"JUPYTER_TOKEN": token, "GOMP_SPINCOUNT": "0", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += [f"--LabApp.user_settings_dir={home / 'settings'}", f"--LabApp.workspaces_dir={home / 'workspaces'}"]
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 0.2).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > until:
                        raise RuntimeError((folder / "lab.log").read_text()[-2000:]) from None
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", token
        finally:
            server.terminate()  # it ends its kernels too
            server.wait(20)


@contextmanager
def chromium(width: int = 1280, height: int = 900):
    """A page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            page = browser.new_page(viewport=dict(width=width, height=height))
            page.errors = []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            yield page
        finally:
            browser.close()


class Notebook:
    """One notebook open in Lab: run its cells, look at its outputs."""

    def __init__(self, page, address: str, token: str, name: str):
        self.page = page
        page.goto(f"{address}/lab/tree/{name}?token={token}")
        page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=60_000,
        )

    def command(self, name: str) -> None:
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name) }", name)

    def run_cell(self, index: int, wait: bool = True) -> None:
        """Run one code or text cell by its index in the notebook."""
        self.page.evaluate("i => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i }", index)
        self.command("notebook:run-cell")
        if wait:
            self.wait_idle()

    def wait_idle(self, timeout: int = 120_000) -> None:
        self.page.wait_for_timeout(150)
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.status === 'idle'",
            timeout=timeout,
        )

    def interrupt(self) -> None:
        self.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.interrupt()"
        )

    def ask(self, code: str) -> str:
        """Run code in the kernel beside the notebook; what it prints."""
        script = """async code => {
            const kernel = window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel;
            const future = kernel.requestExecute({ code, store_history: false });
            let text = "";
            future.onIOPub = m => { if (m.header.msg_type === "stream") text += m.content.text;
                                    if (m.header.msg_type === "error") text += m.content.traceback.join("\\n"); };
            await future.done;
            return text;
        }"""
        return self.page.evaluate(script, code).strip()

    def button(self, name: str):
        return self.page.locator(".jp-OutputArea button", has_text=name).first

    def control(self, label: str):
        """The input or select that a label stands beside."""
        return self.page.locator(
            f".jp-OutputArea .widget-label:text-is('{label}') ~ select, "
            f".jp-OutputArea .widget-label:text-is('{label}') ~ input"
        ).first

    def boards(self, expression: str):
        """What each board shows now: a JavaScript expression over `b`, the board's drawing object."""
        return self.page.evaluate(
            f"() => [...document.querySelectorAll({BOARD!r})].map(e => e.hillinfer).map(b => ({expression}))"
        )

    def wait_board(self, condition: str, which: int = 0, timeout: int = 60_000) -> None:
        self.page.wait_for_function(
            f"() => {{ const b = document.querySelectorAll({BOARD!r})[{which}]?.hillinfer; "
            f"return b && ({condition}) }}",
            timeout=timeout,
        )
