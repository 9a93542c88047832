"""`XrtDrive` over a strict stand-in for pyxrt: the computational drive's contract, and the emulated drive's tokens."""

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fpga.sim import kernel as sim
from fpga.sim.kernel import Config, Kernel
from hillinfer.commands.app import app
from hillinfer.errors import DriveError
from hillinfer.evaluator.codes import head_scores_reference
from hillinfer.systems.hillinfer.card import Xrt
from hillinfer.systems.hillinfer.protocol import Shape
from hillinfer.systems.hillinfer.xrt import XrtDrive
from tests import fake_pyxrt
from tests.test_computational import SMALL, Model, check_blocks, filled
from tests.test_fpga import CONFIGS, opened
from tests.test_hie import generate

INT8, INT4 = CONFIGS[0], CONFIGS[1]
NEW = dict(max_new_tokens=24, do_sample=False, num_beams=1)


def by_numpy(config: Config):
    """A run of the kernel's third mode, in numpy."""

    def run(memory: dict, given: list) -> bool:
        keys, query, out, first, n, _, heads, mode, key_stride, out_stride = given
        assert mode == sim.ALL and n <= config.nmax
        assert (
            not (keys | query | key_stride | first * config.token_bytes) % config.lanes and not (out | out_stride) % 64
        )
        raw = memory[keys][: heads * key_stride].view(np.int8).reshape(heads, key_stride)
        raw = raw[:, first * config.token_bytes : (first + n) * config.token_bytes].reshape(heads, n, -1)
        codes = raw if config.bits == 8 else np.stack(((raw << 4) >> 4, raw >> 4), -1).reshape(heads, n, -1)
        size = heads * config.group * config.head_dim
        asked = memory[query][:size].view(np.int8).reshape(heads, config.group, -1)
        scores = head_scores_reference(asked, codes).reshape(heads, config.group, -1).max(1)
        for head in range(heads):
            region = memory[out][head * out_stride : (head + 1) * out_stride].view(np.int32)
            region[:4] = n, 0, 0, 1
            region[16 : 16 + 2 * n] = np.stack((np.arange(first, first + n), scores[head]), 1).reshape(-1)
        return True

    return run


def by_simulation(kernel: Kernel):
    """A run of the kernel in simulation."""

    def run(memory: dict, given: list) -> bool:
        for address, array in memory.items():
            kernel.map(address, array.ctypes.data, array.nbytes)
        status = kernel.run(*given).status
        for address in memory:
            kernel.unmap(address)
        return status != sim.HUNG

    return run


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Puts a card into the machine: card(config, backend) -> the settings of a drive. Nothing of it is left behind."""
    monkeypatch.setitem(sys.modules, "pyxrt", fake_pyxrt)
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir())), len(fake_pyxrt.open_buffers)

    def make(config: Config = INT8, backend=None, **options) -> Xrt:
        monkeypatch.setattr(fake_pyxrt.device, "backend", staticmethod(backend or by_numpy(config)))
        path = tmp_path / f"{config.name}.xclbin"
        path.write_bytes(fake_pyxrt.MAGIC)
        return Xrt(
            **(dict(xclbin=path, bits=config.bits, timeout=20, page_bytes=64 * 2 * config.token_bytes) | options)
        )

    yield make
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "hillinfer-worker"]
    files, buffers = len(list(Path("/proc/self/fd").iterdir())), len(fake_pyxrt.open_buffers)
    assert files <= before[0] and buffers == before[1]  # what an earlier test left may have been closed since


class Fine(Model):
    """`Model` whose codes are INT4's."""

    def tokens(self, n: int, extreme: bool = False) -> tuple[np.ndarray, np.ndarray]:
        records, codes = super().tokens(n)
        codes = (codes // 18).astype(np.int8)
        self.codes[:, len(self.records) - n :] = codes
        return records, codes


def test_any_order_of_commands_matches_plain_numpy(card, tmp_path_factory):
    """Also with so little memory that nearly all codes are on the flash."""
    slot = 64 * 2 * INT8.token_bytes
    choices = [card(INT8), card(INT8, dram_bytes=8 * slot), card(INT4, dram_bytes=8 * slot)]

    @given(data=st.data())
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def check(data):
        setting = data.draw(st.sampled_from(choices))
        config = INT8 if setting.bits == 8 else INT4
        fake_pyxrt.device.backend = staticmethod(by_numpy(config))
        drive = XrtDrive(tmp_path_factory.mktemp("drive"), SMALL, setting)
        models = [(Model if setting.bits == 8 else Fine)(SMALL, seed) for seed in range(SMALL.streams)]
        commands = st.sampled_from(["write", "write", "hold", "rescale", "truncate", "evaluate", "fetch"])
        for command in data.draw(st.lists(commands, min_size=5, max_size=40)):
            stream = data.draw(st.integers(0, 1)) * 3
            model, positions = models[stream], models[stream].some()
            if command == "write":
                drive.write(stream, len(model.records), *model.tokens(data.draw(st.integers(0, 200))))
            elif command == "hold":
                model.hot[positions] = hot = data.draw(st.booleans())
                drive.hold(stream, positions, hot)
            elif command == "rescale":
                doublings = model.rng.integers(0, 3, (2, 16)).astype(np.uint8)
                drive.rescale(stream, doublings)
                model.codes = np.rint(model.codes / 2.0 ** doublings[:, None]).astype(np.int8)
            elif command == "truncate":
                n = data.draw(st.integers(0, len(model.records)))
                drive.truncate(stream, n)
                model.truncate(n)
            elif command == "evaluate":
                query, block = model.query(), data.draw(st.sampled_from([1, 50, 64, 1000]))
                check_blocks(list(drive.begin_evaluate(stream, query, block)), model, query, block)
            else:
                np.testing.assert_array_equal(drive.fetch(stream, positions), model.records[positions])
        for stream, model in enumerate(models):
            query = model.query()
            check_blocks(list(drive.begin_evaluate(stream, query, 100)), model, query, 100)
            np.testing.assert_array_equal(drive.fetch(stream, np.arange(len(model.records))), model.records)
        drive.close()

    check()


@pytest.mark.parametrize(("config", "ahead"), [(INT8, (False, True)), (INT4, (True,))], ids=["int8", "int4"])
def test_same_tokens_as_the_emulated_drive(config, ahead, card, models, prompt, tmp_path):
    """The kernel in simulation scores for a model in `generate`; with lookahead it also scores ahead of time."""
    model, precision = models("llama"), f"int{config.bits}"
    setting = card(config, by_simulation(opened(config)))
    opened(config).memory(jitter=20, stall=20)
    folder = tmp_path / "drive"
    folder.mkdir()
    want, counted, _ = generate(model, prompt, folder, precision=precision, drive_kind="emulated", lookahead=False)
    for lookahead in ahead:
        options = dict(precision=precision, drive_kind="xrt", xclbin=setting.xclbin, lookahead=lookahead)
        out, own, spans = generate(model, prompt, folder, **options)
        assert torch.equal(out, want) and own.equals(counted)
        assert (spans[spans.kind == "evaluate"].bytes > 0).all()


def test_blocks_come_while_the_kernel_works(card, tmp_path):
    """A run is started before the last one's scores are taken in; the host has the first block before the last run."""
    started, plain = [], by_numpy(INT8)
    gate = threading.Event()

    def run(memory, given):
        started.append(given[3])
        if len(started) == 5:  # the first page is scored by three heads
            gate.wait(20)
        return plain(memory, given)

    drive = XrtDrive(tmp_path, SMALL, card(INT8, run))
    model = filled(drive, 250)
    evaluation = drive.begin_evaluate(0, query := model.query(), 64)
    blocks = [next(evaluation)]
    gate.set()
    check_blocks(blocks + list(evaluation), model, query, 64)
    work = evaluation.work
    assert len(started) == 4 * 3 and work.dram_bytes == 3 * 250 * 2 * 128 and work.measured_s > 0
    drive.close()


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda patch, setting: patch.setitem(sys.modules, "pyxrt", None), "pyxrt.*setup.sh.*drive_kind emulated"),
        (lambda patch, setting: patch.setattr(fake_pyxrt, "DEVICES", 0), "no device 0.*xbutil examine"),
        (lambda patch, setting: patch.setattr(fake_pyxrt, "P2P", False), "P2P is off.*p2p enable"),
        (lambda patch, setting: setting.xclbin.write_bytes(b"other"), "wrong shell"),
        (lambda patch, setting: setting.xclbin.unlink(), "no xclbin"),
        (lambda patch, setting: patch.setattr("hillinfer.systems.hillinfer.card.KERNEL", "other"), "has no other"),
    ],
)
def test_what_is_missing_is_named(card, tmp_path, monkeypatch, break_it, words):
    setting = card()
    break_it(monkeypatch, setting)
    with pytest.raises(DriveError, match=words):
        XrtDrive(tmp_path, SMALL, setting)


def test_what_the_kernel_cannot_do_is_refused(card, tmp_path):
    with pytest.raises(DriveError, match=r"up to 64 channels.*make -C fpga link"):
        XrtDrive(tmp_path, Shape(1, 1, 1024, 2, 128), card(INT4))
    with pytest.raises(DriveError, match="not INT8"):
        XrtDrive(tmp_path, SMALL, card(INT4, bits=8))
    drive = XrtDrive(tmp_path, SMALL, card())
    model = filled(drive, 10)
    for group in (4, 8):  # beyond the kernel's own: it runs once for each head
        check_blocks(list(drive.begin_evaluate(0, query := model.query(group))), model, query, 1024)
    drive.close()
    with pytest.raises(DriveError, match="closed"):
        drive.fetch(0, np.arange(3))


def test_a_card_that_fails_or_hangs_is_an_error(card, tmp_path):
    def failed(memory, given):
        by_numpy(INT8)(memory, given)
        memory[given[2]][8] = sim.READ_ERROR
        return True

    for backend, words in [
        (lambda *_: False, "no answer for 0.2 s"),
        (lambda *_: True, "no answer written"),
        (lambda *_: fake_pyxrt.ert_cmd_state.ERT_CMD_STATE_ERROR, "ended a run"),
        (failed, "failed read"),
    ]:
        drive = XrtDrive(tmp_path, SMALL, card(INT8, backend, timeout=0.2))
        model = filled(drive, 10)
        with pytest.raises(DriveError, match=words):
            list(drive.begin_evaluate(0, model.query()))
        drive.close()


def test_without_a_card_the_command_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Once upon a time")
    words = ["run", "--model", "embedded", "--prompt-file", prompt, "--system", "hillinfer", "--drive-kind", "xrt"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--drive", tmp_path)])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    for word in ("pyxrt", "setup.sh", "drive_kind emulated"):
        assert word in done.stderr
