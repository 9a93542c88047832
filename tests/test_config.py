"""Settings validate values without file access; the drive's folder is checked once, when a cache is created."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hillinfer
from hillinfer.config import Settings, check_folder
from hillinfer.errors import UsageError

ORPHAN = ".hillinfer-0123abcd.drive"
listening: list[list] = []


def hear(event: str, arguments: tuple) -> None:
    """An audit hook stays for good; it listens while a list is there."""
    if listening and event.partition(".")[0] in ("open", "os", "shutil", "tempfile", "fcntl", "pathlib"):
        listening[-1].append((event, arguments))


sys.addaudithook(hear)


def heard(work) -> list:
    """The audit events of files and folders during a call."""
    listening.append([])
    try:
        work()
        return listening[-1]
    finally:
        listening.pop()


def test_settings_touch_no_file(tmp_path):
    (tmp_path / ORPHAN).touch()
    options = dict(drive=tmp_path, drive_kind="emulated", profile=tmp_path / "none.toml", host_budget="1GiB")
    assert heard(lambda: replace(Settings(**options), alpha=0.5)) == []
    assert heard(lambda: Settings(drive="/nowhere/at/all")) == []
    assert [path.name for path in tmp_path.iterdir()] == [ORPHAN]
    assert heard(lambda: check_folder(tmp_path)), "the hook hears a check that does touch files"
    assert not list(tmp_path.iterdir()), "and the check removes the orphan and its own proof"


def test_a_drive_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home")
    assert Settings(drive="kv").drive == tmp_path / "kv"
    assert Settings(drive="~/kv").drive == Path("/home/kv")
    assert Settings().drive is None and check_folder(None) is None


def test_a_cache_is_refused_at_once_on_a_folder_that_cannot_be_used(models, tmp_path):
    (tmp_path / "file").touch()
    for system in ("hillinfer", "dualblade", "topk"):
        with pytest.raises(UsageError, match="does not exist"):
            hillinfer.make_cache(models("llama").config, system, drive="/nowhere")
        with pytest.raises(UsageError, match="not a folder"):
            hillinfer.make_cache(models("llama").config, system, drive=tmp_path / "file")


def test_the_folder_is_checked_once_for_a_cache(models, prompt, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr("hillinfer.run.check_folder", lambda path: checked.append(path))
    model = models("llama")
    with hillinfer.make_cache(model, "hillinfer", drive=tmp_path) as cache:
        model.generate(prompt, past_key_values=cache, max_new_tokens=2)
    assert checked == [tmp_path]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(alpha=0), "alpha is 0; choose a share"),
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(alpha="0.2"), "alpha is '0.2'"),
        (dict(sinks=-1), "sinks is -1; give a whole number of at least 0"),
        (dict(recent=0), "recent is 0; give a whole number of at least 1"),
        (dict(io_threads=1.5), "io_threads is 1.5"),
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(timeout=0), "timeout is 0; give the seconds"),
        (dict(timeout=1e6), "timeout is 1000000.0"),
        (dict(pinned=1.1), "pinned is 1.1"),
        (dict(compress="some"), "compress is 'some'; .* or auto"),
        (dict(lookahead=None), "lookahead is None; .* or auto"),
        (dict(checksums="yes"), "checksums is 'yes'; give true or false"),
        (dict(drive_kind="tape"), "no drive_kind 'tape'; choose ssd, emulated, xrt"),
        (dict(placement="best"), "no placement 'best'; choose hits"),
        (dict(precision="int3"), "no precision 'int3'; choose int8, int4, int2"),
        (dict(split="even"), "no split 'even'"),
        (dict(engine="aio"), "no engine 'aio'"),
        (dict(stream="all"), "no stream 'all'; choose None, host"),
        (dict(pipelining="both"), "no pipelining 'both'"),
        (dict(host_budget="lots"), "'lots' is not an amount of memory"),
        (dict(profile="p.toml"), "profile is for .*: add drive_kind emulated"),
        (dict(paced=True), "paced is for .*: add drive_kind emulated"),
        (dict(paced=True, drive_kind="xrt"), "paced is for .*: add drive_kind emulated"),
        (dict(xclbin="k.xclbin"), "xclbin is for .*: add drive_kind xrt"),
        (dict(device="/dev/null"), "dualblade"),
        (dict(stream="dual", drive_kind="xrt"), "leave out drive_kind"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_fix(wrong, words):
    with pytest.raises(UsageError, match=words) as refused:
        Settings(**wrong)
    assert len(str(refused.value).splitlines()) == 1


def test_every_limit_of_a_value_is_allowed():
    for fine in (dict(alpha=1), dict(pinned=0), dict(pinned=1.0), dict(lookahead=True), dict(lookahead=0.6)):
        Settings(**fine)
    Settings(compress="auto", lookahead="auto", sinks=0, recent=1, timeout=0.5, max_tokens=1)
    Settings(drive_kind="emulated", paced=True, profile="p.toml")
    Settings(drive_kind="xrt", xclbin="k.xclbin", profile="p.toml")
