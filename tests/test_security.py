"""Security: no code execution from data, private files in the named folder, pages that escape their input."""

import ast
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hillinfer import UsageError, files
from hillinfer.config import check_folder
from hillinfer.tiers.record_file import RecordFile
from hillinfer.timeline import Timeline
from hillinfer.whatif.devices import find_profile

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for part in ("hillinfer", "data", "benchmarks", "fpga", "notebooks") for path in (ROOT / part).rglob("*.py")
]
BANNED = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def offences(text: str) -> list[str]:
    """What lets data become code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in BANNED]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            called, values = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "joblib.load", "yaml.load"):
                found.append(called)
            if called == "torch.load" and values.get("weights_only") != "True":
                found.append("torch.load without weights_only")
            banned = ("shell", "trust_remote_code", "allow_pickle")
            found += [f"{name}={values[name]}" for name in banned if values.get(name, "False") != "False"]
    return found


def test_no_source_lets_data_become_code():
    assert len(SOURCES) > 100
    assert {path.name: bad for path in SOURCES if (bad := offences(path.read_text()))} == {}


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from dill import loads", "eval(x)", "torch.load(p)", "run(c, shell=True)", "os.system(c)",
     "f(trust_remote_code=True)", "f(trust_remote_code=x)", "np.load(p, allow_pickle=True)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(text):
    assert len(offences(text)) == 1


def test_a_models_own_code_never_runs(tmp_path):
    from hillinfer.commands.continuation import continue_text

    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError, match="cannot load model"):
        continue_text(str(tmp_path), "text", "full", {})
    assert not (tmp_path / "ran").exists()


WRITERS = {
    "trace": lambda path: Timeline().save(path),
    "profile": lambda path: find_profile("h200").save(path),
    "text": lambda path: files.write_text(path, "x"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_results_are_written_whole_and_never_through_links_or_into_devices(tmp_path, write):
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    os.mkfifo(tmp_path / "pipe")
    for name, word in (
        ("link", "a link"),
        ("pipe", "not a regular file"),
        (".", "a folder"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(UsageError, match=word):
            write(tmp_path / name)
    assert (tmp_path / "theirs").read_text() == "mine"
    write(tmp_path / "new" / "file")
    write(tmp_path / "new" / "file")  # over what is there
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("nameless", [True, False])
def test_the_drives_file_is_private_and_has_no_name(tmp_path, monkeypatch, nameless):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")  # as on a file system without such files
    drive = RecordFile(tmp_path, 256, 1)
    about = os.fstat(drive.fd)
    assert stat.S_IMODE(about.st_mode) == 0o600 and about.st_nlink == 0 and not list(tmp_path.iterdir())
    drive.write(0, 0, np.full((16, 256), 7, np.uint8))
    drive.close()


KILLED = """
import os, signal, sys
from pathlib import Path
del os.O_TMPFILE
Path.unlink = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # at the worst moment
from hillinfer.tiers.record_file import RecordFile
RecordFile(Path(sys.argv[1]), 256, 1)
"""


def test_what_a_kill_left_is_reclaimed_and_what_is_in_use_is_not(tmp_path, monkeypatch):
    code = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT).returncode
    assert code == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    own, live = files.scratch(tmp_path, ".hillinfer-", ".drive")
    (tmp_path / ".hillinfer-notes.txt").write_text("mine")
    monkeypatch.delattr(os, "O_TMPFILE")
    RecordFile(tmp_path, 256, 1).close()
    assert {path.name for path in tmp_path.iterdir()} == {live.name, ".hillinfer-notes.txt"}
    os.close(own)


def test_without_locks_files_are_made_and_those_of_others_left_alone(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    fd, path = files.scratch(tmp_path, ".a-")
    files.write_text(tmp_path / "report", "whole")
    assert check_folder(tmp_path) == tmp_path and files.reclaim(tmp_path, ".a-") == []
    assert {found.name for found in tmp_path.iterdir()} == {path.name, "report"}
    os.close(fd)


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.seen += [name for name, value in attributes if name.startswith("on") or "javascript:" in (value or "")]


HOSTILE = "</script></title><script>alert(1)</script><img src=x onerror=alert(2)>/*ESM*//*DATA*/<!--"


def board_page(text: str) -> str:
    from hillinfer.workbench.board import show_timeline

    timeline = Timeline()
    timeline.add("cpu", text, 0, 0, 0, 1000)
    board = show_timeline(timeline)
    board.source.tokens = [(text, 0, 1.0, False), (text, 0, 2.0, True)]
    board.state = {"title": text, "setting": text}
    return board.html(text)


def report_page(folder: Path, text: str) -> str:
    from hillinfer.workbench.figures import systems_figure, timeline_figure
    from hillinfer.workbench.report import write_report

    timeline = Timeline()
    timeline.add("cpu", text, 0, 0, 0, 1000)
    figures = [systems_figure([text], [0.5], 0.2, text), timeline_figure(timeline, text)]
    return write_report(folder / "r.html", text, [text], [text, "n"], [[text, text]], figures).read_text()


def test_pages_show_what_documents_and_models_say_and_run_none_of_it(tmp_path):
    """A page of a hostile document has the elements of a harmless one's, and no others."""
    for page in (board_page, lambda text: report_page(tmp_path, text)):
        assert Tags(page(HOSTILE)).seen == Tags(page("harmless")).seen
    data = board_page(HOSTILE).split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["message"]["tokens"][0][0] == HOSTILE  # shown as it is


def test_the_boards_script_sets_text_and_no_markup():
    for path in (ROOT / "hillinfer/workbench/static").glob("*.js"):
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in path.read_text(), (path.name, word)


def test_lab_listens_on_loopback_and_keeps_its_token(monkeypatch, tmp_path):
    from hillinfer.workbench import lab

    ran = []
    monkeypatch.setattr(lab.os, "execv", lambda path, command: ran.append(command))
    lab.open_lab(tmp_path)
    assert [word for word in ran[0] if word.startswith("--ip")] == ["--ip=127.0.0.1"]
    assert not [word for word in ran[0] for bad in ("token", "password", "origin", "xsrf") if bad in word]
