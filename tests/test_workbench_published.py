"""Figures for papers show a folder's numbers, and say in what setting they were made."""

import re
from dataclasses import replace

import numpy as np
import pytest

from hillinfer import UsageError
from hillinfer.longbench import report
from hillinfer.longbench.fidelity_table import fidelity
from hillinfer.longbench.job import EvalSettings
from hillinfer.longbench.plan import Evaluation
from hillinfer.longbench.results import read
from hillinfer.timeline import Timeline
from hillinfer.workbench import published
from hillinfer.workbench.evalrun import EvalRun
from hillinfer.workbench.vector import timeline_svg


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two evals of the embedded model, with different host budgets."""
    place, made = tmp_path_factory.mktemp("published"), []
    for budget in ("1MiB", "3MiB"):
        settings = EvalSettings(fidelity=("reference",), options=(("host_budget", budget),), times=True)
        asked = Evaluation(place / budget, ["embedded"], ["lines_1k"], ["topk", "hillinfer"], [0.1, 0.2], 1)
        EvalRun(replace(asked, settings=settings), ["test"]).start().result()
        made.append(place / budget)
    return made


def captions(figure) -> str:
    return re.sub("<br>", " ", figure.layout.annotations[-1].text)


def test_each_is_one_call_with_its_setting(folders):
    frame = report.frame_of(read(folders[0]))
    table, close = report.scores(frame), fidelity(frame)
    budget, kept = published.accuracy_by_budget(folders[0]), published.fidelity_by_budget(folders[0])
    own = table[(table.system == "topk") & (table.task == "average")].sort_values("alpha")
    [line] = [trace for trace in budget.data if trace.name == "topk"]
    assert list(line.x) == [0.1, 0.2] and list(line.y) == list(own.score)
    [line] = [trace for trace in kept.data if trace.name == "hillinfer"]
    assert list(line.y) == list(close[close.system == "hillinfer"].sort_values("attended").kl)
    nbytes = report.costs(frame).set_index(["system", "alpha"]).KV_attended_KiB_per_token
    for figure in (published.accuracy_by_bytes(folders[0]), published.fidelity_by_bytes(folders[0])):
        [line] = [trace for trace in figure.data if trace.name == "topk"]
        assert list(line.x) == [nbytes["topk", 0.1], nbytes["topk", 0.2]]
    for figure in (budget, kept):
        for part in ("embedded (float32)", "1 samples of lines_1k", "question stepwise", "seed 42", "host_budget 1MiB"):
            assert part in captions(figure)


def test_hit_rates_by_memory(folders):
    figure = published.hits_by_pool(*folders)
    assert [trace.name for trace in figure.data] == [
        "hillinfer, alpha 0.1",
        "hillinfer, alpha 0.2",
    ]
    for trace in figure.data:
        assert len(trace.x) == 2 and trace.x[0] < trace.x[1] and trace.y[0] < trace.y[1]  # more memory, more hits
    assert [trace.name for trace in published.hits_by_pool(folders[0]).data] == ["hillinfer"]


def test_what_a_folder_lacks_is_said(folders, tmp_path):
    with pytest.raises(UsageError, match=r"has no results\.jsonl"):
        published.accuracy_by_budget(tmp_path)
    rows = [row | {"question": "prefilled"} for row in read(folders[0])] + read(folders[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "read", lambda folder: rows)
        with pytest.raises(UsageError, match="choose question='prefilled' or another"):
            published.accuracy_by_budget(folders[0])
        assert "question prefilled" in captions(published.accuracy_by_budget(folders[0], question="prefilled"))


def test_models_side_by_side():
    figure = published.sparsity_by_model({"one": np.full((2, 3), 0.1), "other": np.full((4, 5), 0.01)}, "by hand")
    assert [np.shape(trace.z) for trace in figure.data] == [(2, 3), (4, 5)] and figure.data[0].z[0][0] == -1
    assert "by hand" in captions(figure)


def test_a_timeline_as_svg(tmp_path):
    timeline = Timeline()
    with pytest.raises(UsageError, match="no spans"):
        timeline_svg(timeline, tmp_path / "t.svg")
    for step in range(5):
        timeline.add("cpu", "select", 0, step, 1000 * step, 1000 * step + 400)
        timeline.add("drive", "read", 1, step, 1000 * step + 200, 1000 * step + 900, 4096)
    text = timeline_svg(timeline, tmp_path / "t.svg", 2, "a < b").read_text()
    assert text.count("<title>") == 4 and "2 steps" in text and "a &lt; b" in text and "measured" in text
    assert "drive read" in text and ">cpu<" in text and ">gpu<" not in text
