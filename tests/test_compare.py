"""Comparing two results: ratios are correct, unmatched rows are named, invalid input is a one-line error."""

import json

from benchmarks.compare import compare, main

BEFORE = {"facts": {"load": 1}, "rows": [{"name": "score", "ms": 4.0}, {"name": "gone", "ms": 1.0}], "seam": []}
AFTER = {
    "facts": {"load": 2},
    "rows": [{"name": "score", "ms": 2.0}],
    "seam": [{"system": "full", "tokens": 8, "us": 3}],
}


def test_ratios_and_what_is_missing():
    lines = compare(BEFORE, AFTER)
    assert lines[0] == "load: 1 -> 2"
    (score,) = [line for line in lines if "score" in line]
    assert score.split()[-3:] == ["4", "2", "0.500"]
    assert any(line.startswith("only before: rows gone") for line in lines)
    assert any(line.startswith("only after: seam full 8") for line in lines)


def test_bad_files_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(BEFORE))
    for words in (["a.json"], ["a.json", "none.json"]):
        monkeypatch.setattr("sys.argv", ["compare", *(str(tmp_path / word) for word in words)])
        assert main() == 2 and len(capsys.readouterr().err.splitlines()) == 1
