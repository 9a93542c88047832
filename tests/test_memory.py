"""Under a real memory limit, a run succeeds or is rejected at its start with the required sum; it is never killed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hillinfer
from benchmarks.memory_cgroup import CgroupError, MemoryCgroup
from hillinfer.pipeline import memory as needs
from hillinfer.pipeline.memory import Memory
from hillinfer.systems.registry import run_for
from hillinfer.tiers.geometry import Geometry

MIB = 1 << 20
CODE = "import sys; from benchmarks.memory_cgroup import MemoryCgroup; from pathlib import Path\n"
CODE += "Path(sys.argv.pop(1), 'cgroup.procs').write_text(str(__import__('os').getpid()))\n"
CODE += "from hillinfer.commands.app import main; main()"


def test_a_refusal_shows_the_sum(monkeypatch):
    monkeypatch.setattr(needs, "read_memory", lambda root: Memory(1000 * MIB, 300 * MIB, 0, "cgroup v2 box"))
    needs.refuse({"weights": 300 * MIB, "KV in memory": 400 * MIB}, "fix")
    with pytest.raises(hillinfer.UsageError) as refused:
        needs.refuse({"weights": 300 * MIB, "KV in memory": 401 * MIB}, "buy more")
    assert str(refused.value) == (
        "this run needs about 701 MiB of host memory (weights 300 MiB + KV in memory 401 MiB), but cgroup v2 box has "
        "1,000 MiB, less 300 MiB in use: buy more"
    )


def host_memory(settings: hillinfer.Settings) -> dict[str, int]:
    """What 128K tokens of a model of Llama-8B's shape need."""
    run = run_for(settings)(settings, 32)
    run.geometry = Geometry(1, 8, 128, torch.bfloat16, torch.device("cpu"))
    return needs.needs(run, None, 131_072)


@pytest.mark.parametrize("options", [{}, dict(stream="host", host_budget="1GiB")])
def test_needs_follow_the_settings(tmp_path, options):
    """A drive takes KV out of memory; a budget bounds what is left."""

    def kv(**more) -> int:
        return host_memory(hillinfer.Settings(**more))["KV in memory"]

    assert kv() > 131_072 * 32 * 4096
    assert kv(drive=tmp_path, **options) < kv() / 1.8
    assert kv(drive=tmp_path, host_budget="2GiB", alpha=0.1) <= 2.2 * 2**30


@pytest.mark.parametrize("stream", ["host", "dual", "page-cache", "direct"])
def test_a_system_that_streams_keeps_no_codes(tmp_path, stream):
    assert "codes and index" not in host_memory(hillinfer.Settings(drive=tmp_path, stream=stream))
    assert "codes and index" in host_memory(hillinfer.Settings(drive=tmp_path))


def test_a_cache_is_refused_before_its_drive_is_opened(models, prompt, tmp_path, monkeypatch):
    model = models("llama")
    monkeypatch.setattr(needs, "read_memory", lambda root: Memory(50 * MIB, 0, 0, "a small box"))
    with hillinfer.make_cache(model, "hillinfer", drive=tmp_path) as cache:
        with pytest.raises(hillinfer.UsageError, match=r"needs about \d+ MiB .* a small box has 50 MiB"):
            model.generate(prompt, past_key_values=cache, max_new_tokens=2)
        monkeypatch.undo()
        assert model.generate(prompt, past_key_values=cache, max_new_tokens=2, do_sample=False).shape[1] == 152


def limited(limit: int, *words) -> subprocess.CompletedProcess:
    with MemoryCgroup(limit) as group:
        command = [sys.executable, "-c", CODE, str(group.folder), "run", "--model", "embedded", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("system", ["full", "hillinfer", "dualblade"])
def test_under_a_real_limit_nothing_is_killed(system, tmp_path):
    """From a limit in which nothing fits to one in which all does."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("line a-b: REGISTER_CONTENT is <12345>\n" * 250)
    drive = tmp_path / "drive"
    drive.mkdir()
    words = ["--prompt-file", prompt, "--system", system, "--max-new-tokens", 4]
    words += ["--drive", drive] if system != "full" else []
    try:
        done = {limit: limited(limit * MIB, *words) for limit in (200, 500, 650, 800, 1000, 1300, 2000)}
    except CgroupError as error:
        pytest.skip(str(error))
    for limit, run in done.items():
        assert run.returncode in (0, 2), (limit, run.returncode, run.stderr[-500:])
        if run.returncode:
            assert re.search(r"needs about [\d,]+ MiB of host memory \(.*\), but cgroup v\d", run.stderr), run.stderr
    codes = [run.returncode for run in done.values()]
    assert codes == sorted(codes, reverse=True) and codes[0] == 2 and codes[-1] == 0
    assert not list(drive.iterdir())
