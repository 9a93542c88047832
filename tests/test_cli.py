"""The command line: invalid input is a one-line error that names the fix, exit code 2, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import BertConfig, MistralConfig, T5Config
from typer.testing import CliRunner

from hillinfer.assets import data_folder, load_embedded
from hillinfer.commands.app import app
from hillinfer.errors import UsageError


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("line a-b: REGISTER_CONTENT is <12345>\n" * 20)
    return path


@pytest.fixture
def drive(tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir()), "a file was left in the drive folder"


def hillinfer(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def run(prompt_file, *words, model="embedded"):
    return hillinfer("run", "--model", model, "--prompt-file", prompt_file, *words)


def test_run_continues_a_text_on_every_kind_of_system(prompt_file, drive):
    texts = []
    for system in ("full", "hillinfer"):
        trace = prompt_file.parent / "trace.json"
        words = ["--system", system, "--alpha", 1, "--drive", drive, "--max-new-tokens", 8, "--trace", trace]
        result = run(prompt_file, *words)
        assert result.exit_code == 0, result.output
        assert trace.exists() and "ms/token" in result.stderr
        texts.append(result.stdout)
    assert texts[0] == texts[1] != ""


def check(result, *words):
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert line.startswith("error:") and len(line.splitlines()) == 1
    for word in words:
        assert word in line, line


def test_help_names_every_command():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    result = hillinfer("--help")
    assert result.exit_code == 0 and {"run", "demo", "eval"} <= names
    assert all(name.replace("_", "-") in result.stdout for name in names)


def test_unknown_system(prompt_file, drive):
    check(run(prompt_file, "--system", "magic", "--drive", drive), "magic", "full", "hillinfer")
    check(hillinfer("demo", "--systems", "full,magic", "--out", prompt_file.parent / "out"), "magic")
    check(hillinfer("demo", "--systems", "", "--out", prompt_file.parent / "out"), "no system", "full")


def test_systems_are_listed_with_what_they_are():
    result = hillinfer("systems")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert {"full", "streaming", "topk", "oracle", "random", "lru", "hillinfer"} <= set(lines)
    assert all(len(lines[name].split()) > 3 for name in ("full", "topk", "lru", "hillinfer"))


@pytest.mark.parametrize("alpha", ["0", "-1", "1.5", "nan"])
def test_alpha_out_of_range(prompt_file, alpha):
    check(run(prompt_file, "--alpha", alpha), "alpha", "up to 1")
    check(hillinfer("demo", "--alpha", alpha, "--out", prompt_file.parent / "out"), "alpha")


def test_the_demo_asks_any_model_for_codes_in_a_novel(tmp_path):
    check(hillinfer("demo", "--tokens", "900", "--out", tmp_path), "--model")
    words = ("demo", "--model", data_folder("model"), "--out", tmp_path, "--systems", "streaming")
    check(hillinfer(*words, "--tokens", "99"), "800")
    result = hillinfer(*words, "--tokens", "900", "--questions", "1")
    assert result.exit_code == 0, result.output
    assert re.search(r"^ *full .* 0 +100% *$", result.stdout, re.M) and "streaming" in result.stdout
    assert (tmp_path / "report.html").exists() and not list((tmp_path / "drive").iterdir())


def test_a_system_that_lacks_its_drive(prompt_file):
    check(run(prompt_file, "--system", "hillinfer"), "--drive")


def test_a_budget_that_is_no_amount(prompt_file, drive):
    check(run(prompt_file, "--host-budget", "lots", "--drive", drive), "lots", "64MiB")


def test_a_budget_below_all_kv_without_a_drive(prompt_file):
    check(run(prompt_file, "--system", "topk", "--host-budget", "1KiB"), "name a drive folder")


def test_a_drive_path_that_cannot_be_used(prompt_file, tmp_path):
    check(run(prompt_file, "--drive", tmp_path / "nowhere"), "does not exist", "mkdir")
    check(run(prompt_file, "--drive", prompt_file), "not a folder")
    check(run(prompt_file, "--drive", "/proc"), "no file can be made in /proc")


def test_a_drive_that_is_too_full(prompt_file, drive, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    check(run(prompt_file, "--drive", drive), "do not fit", "100 free")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_file_system_that_is_really_full(prompt_file, tmp_path):
    """256 KiB, really: refused by arithmetic before loading; with that blinded, in mid-run and without a trace."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mount is not allowed here")
    try:
        check(run(prompt_file, "--drive", folder), "do not fit")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "hillinfer.systems.planning.shutil.disk_usage", lambda path: type("usage", (), {"free": 1 << 40})
            )
            result = run(prompt_file, "--drive", folder)
        assert result.exit_code == 1 and "No space left" in result.stderr
        assert not list(folder.iterdir()) and os.statvfs(folder).f_bfree == os.statvfs(folder).f_blocks
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_profile_that_cannot_be_used(prompt_file, drive, tmp_path):
    path = tmp_path / "profile.toml"
    words = ["--drive", drive, "--profile", path]
    check(run(prompt_file, *words), "drive_kind emulated")
    check(run(prompt_file, *words, "--drive-kind", "emulated"), "hillinfer profile")
    check(run(prompt_file, "--drive", drive, "--drive-kind", "tape"), "ssd, emulated")
    check(run(prompt_file, "--drive", drive, "--precision", "int3"), "int8, int4, int2")


def test_profile_measures_and_writes(drive, prompt_file, tmp_path):
    out = tmp_path / "new" / "profile.toml"
    result = hillinfer("profile", "--drive", drive, "--out", out, "--no-device")
    assert result.exit_code == 0 and "a step is shortest" in result.stdout
    from hillinfer.systems.hillinfer.profile import Profile

    assert Profile.load(out).speeds(4096).beta(0.1, 1024, 4096) > 0
    assert Profile.load(out).sources()["measured"] >= 9 and not Profile.load(out).kinds
    result = run(prompt_file, "--drive", drive, "--drive-kind", "emulated", "--profile", out)
    assert result.exit_code == 0 and "by the profile" in result.stderr, result.output
    prompt_file.rename(out)
    check(hillinfer("profile", "--drive", drive, "--out", out), "is not a profile of this machine")
    check(hillinfer("profile", "--drive", tmp_path / "nowhere"), "does not exist")


def test_beams_with_a_drive(prompt_file, drive):
    check(run(prompt_file, "--num-beams", 3, "--drive", drive), "--num-beams 1")
    check(run(prompt_file, "--num-beams", 3, "--exact", "--system", "topk"), "--num-beams 1 with --exact")
    check(run(prompt_file, "--exact", "--system", "full"), "attends to all tokens already")


@pytest.mark.parametrize("name", ["[run]1", "a [/b]", "[red]"])
def test_square_brackets_in_paths_are_printed_as_they_are(prompt_file, tmp_path, name):
    trace = tmp_path / name / "t.json"
    result = run(prompt_file, "--system", "topk", "--max-new-tokens", 1, "--trace", trace)
    assert result.exit_code == 0 and str(trace) in result.stderr
    missing = tmp_path / name / "no model"
    assert str(missing) in run(prompt_file, "--system", "topk", model=missing).stderr


def test_beams_in_memory_work(prompt_file):
    result = run(prompt_file, "--system", "topk", "--num-beams", 3, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MistralConfig(sliding_window=64), ("sliding window", "full attention")),
        (T5Config(), ("encoder-decoder", "Llama")),
        (BertConfig(), ("decoder",)),
    ],
    ids=["sliding-only", "encoder-decoder", "encoder"],
)
def test_a_family_that_the_seam_does_not_fit(prompt_file, tmp_path, config, words):
    config.save_pretrained(tmp_path / "model")  # no weights there: it is refused before they are looked for
    load_embedded()[1].save_pretrained(tmp_path / "model")
    check(run(prompt_file, "--system", "topk", model=tmp_path / "model"), *words)


def test_a_model_that_is_not_there(prompt_file, tmp_path):
    check(run(prompt_file, "--system", "topk", model=tmp_path / "none"), "config.json")


def test_prompts_that_cannot_be_used(prompt_file, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(prompt_file.read_text() * 60)
    check(run(long, "--system", "topk"), "window", "shorten")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    check(run(empty, "--system", "topk"), "empty")
    check(run(tmp_path / "absent.txt", "--system", "topk"), "absent.txt", "there is no file")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    check(run(binary, "--system", "topk"), "UTF-8")


def test_bad_options_are_refused_without_torch_or_numpy(prompt_file, tmp_path):
    code = "import sys; sys.argv = sys.argv[1:]\nfrom hillinfer.commands.app import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules or 'numpy' in sys.modules)"
    words = ["hillinfer", "demo", "--alpha", "7", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.strip() == "False"


@pytest.mark.skipif(not (data_folder("model") / "model.safetensors").exists(), reason="no embedded model")
def test_ctrl_c_in_the_middle_of_the_demo_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "hillinfer", "demo", "--systems", "hillinfer", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    folder = tmp_path / "out" / "drive"
    try:
        deadline = time.monotonic() + 60
        while not any(str(folder) in link for link in open_files(process.pid)):  # until the cache is on the drive
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
    assert not list(folder.iterdir())


def open_files(pid: int) -> list[str]:
    """What the links in /proc/PID/fd point to; an unlinked file's ends in ' (deleted)'."""
    links = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            links.append(str(link.readlink()))
    return links


def test_a_session_is_made_once_and_opened_after(prompt_file, drive):
    folder = prompt_file.parent
    session, ask = folder / "doc.kv", ("run", "--model", "embedded", "--max-new-tokens", "3", "--dtype", "float32")
    check(hillinfer(*ask, "--session", session, "--prompt", "The", "--system", "full"), "no session", "--document")
    check(hillinfer(*ask, "--document", prompt_file, "--system", "full"), "--prompt-file", "--prompt")
    looks = (*ask, "--document", prompt_file, "--session", session, "--prompt", "The", "--system", "h2o")
    check(hillinfer(*looks), "h2o", "without a session")
    words = ("--session", session, "--prompt", " What is", "--system", "topk")
    first = hillinfer(*ask, "--document", prompt_file, *words)
    again = hillinfer(*ask, *words)
    assert first.exit_code == again.exit_code == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout
    assert session.exists()
    (folder / "other.txt").write_text("Another text altogether.")
    check(hillinfer(*ask, "--document", folder / "other.txt", *words), "another document")
    tiered = hillinfer(*ask, *words[:-1], "hillinfer", "--drive", drive)
    assert tiered.exit_code == 0, tiered.stderr
    assert not list(drive.iterdir())


def test_lab_opens_the_notebooks_on_loopback(tmp_path, monkeypatch):
    """In a folder of the user's, whose changes stay; on 127.0.0.1, with Jupyter's own token."""
    from hillinfer.workbench import lab

    become = []
    monkeypatch.setattr(lab.os, "execv", lambda program, command: become.append(command))
    monkeypatch.setattr(lab, "find_spec", lambda name: True)
    (tmp_path / "00_first_run.ipynb").write_text("mine")
    lab.open_lab(tmp_path, browser=False)
    assert (tmp_path / "00_first_run.ipynb").read_text() == "mine"
    assert (tmp_path / "05_write_your_policy.ipynb").exists()
    [command] = become
    assert command[2:4] == ["jupyterlab", str(tmp_path / "00_first_run.ipynb")]
    assert "--ip=127.0.0.1" in command and "--no-browser" in command and not any("token" in part for part in command)
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'hillinfer\[lab\]'"):
        lab.open_lab(None)
