"""`hillinfer bench`: all systems in one table, identical in CSV and JSON; invalid input is a one-line error."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from hillinfer import list_systems
from hillinfer.commands.app import app


def bench(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def test_every_system_is_in_the_table(tmp_path):
    result = bench("--context", 256, "--n", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "table.csv").set_index("system")
    answers = pd.read_csv(tmp_path / "answers.csv")
    saved = json.loads((tmp_path / "table.json").read_text())
    left_out = [line for line in saved["setting"] if line.startswith("left out")]
    assert len(table) + len(left_out) == len(list_systems())
    assert all(name in result.output for name in table.index) and len(answers) == len(table)
    assert [row["system"] for row in saved["systems"]] == list(table.index)
    assert (table.questions == 1).all() and (table.ms_median > 0).all() and (table.kv_bytes > 0).all()
    assert (table[["hit_device", "hit_host", "hit_drive"]].sum(axis=1) - 1).abs().max() < 1e-9
    assert table.exact["full"] and not table.exact["leoam"]
    assert table.attended["full"] == table.cached["full"] > 2 * table.attended["topk"]
    assert table.drive_bytes_per_token["hillinfer"] > 0 == table.drive_bytes_per_token["full"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.csv", "table.csv", "table.json"]


def test_decoded_exactly_a_system_answers_as_full(tmp_path):
    words = "--systems", "full,topk,hillinfer", "--context", 256, "--n", 2, "--alpha", 0.1
    assert bench(*words, "--exact", "--out", tmp_path).exit_code == 0
    table, answers = pd.read_csv(tmp_path / "table.csv"), pd.read_csv(tmp_path / "answers.csv")
    assert table.exact.all() and table.right.nunique() == 1
    assert (table.questions == 2).all() and len(answers) == 2 * len(table) == 6


@pytest.mark.parametrize(
    "words, why",
    [
        (["--task", "cooking"], "choose one of lines"),
        (["--exact", "--systems", "full,h2o"], "use hillinfer or topk"),
        (["--systems", "full,nonsense"], "no system 'nonsense'"),
        (["--systems", ","], "no system ','"),
        (["--alpha", "2"], "alpha is 2"),
        (["--context", "9000"], "window of 8,192"),
        (["--drive", "/nowhere"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, why):
    result = bench(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and why in result.stderr and result.stderr.count("\n") == 1
