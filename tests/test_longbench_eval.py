"""`hillinfer eval`: the table is the same if killed and resumed, on one process or many; its costs are measured."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hillinfer import list_systems
from hillinfer.commands.app import app
from hillinfer.loading import model_path
from hillinfer.longbench import reference, report, sweep
from hillinfer.longbench.job import EvalSettings, Job, run_job
from hillinfer.longbench.results import Results, read, read_manifest
from hillinfer.longbench.statistics import interval, paired
from hillinfer.longbench.tasks import find_task, longbench
from hillinfer.prefix_store.keeper import Keeper
from tests.longbench_rows import rows, write_model, write_rows

for library in ("datasets", "rapidfuzz", "rouge", "jieba", "joblib"):
    pytest.importorskip(library, reason="pip install 'hillinfer[longbench]'")

V1 = [task.name for task in longbench().values() if task.suite == "longbench"]
TASKS = ["hotpotqa", "passage_count"]  # short answers
SMALL = ["--tasks", ",".join(TASKS), "--systems", "topk,hillinfer", "--alpha", "0.1,0.3", "--samples", "2"]
SMALL += ["--question", "prefilled"]  # a third of the steps


def hillinfer(*words, code=0):
    result = CliRunner().invoke(app, ["eval", *(str(word) for word in words)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's folder and rows of every v1 task."""
    folder = tmp_path_factory.mktemp("eval")
    write_rows(folder / "rows", [*V1, "lcc_e"], words=120)
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def common(place):
    return ["--model", place / "model", "--data", place / "rows", *SMALL]


@pytest.fixture(scope="module")
def done(place, common):
    """The results folder of an uninterrupted run."""
    hillinfer(*common, "--out", place / "whole")
    return place / "whole"


def test_decoded_exactly_every_answer_is_that_of_full(place, common):
    out = place / "exact"
    hillinfer(*common, "--exact", "--out", out)
    rows = read(out)
    assert len(rows) == 2 * 2 * 5
    full = {row["id"]: row["pred"] for row in rows if row["system"] == "full"}
    assert all(row["pred"] == full[row["id"]] for row in rows) and any(full.values())
    assert "with exact True, not None" in hillinfer(*common, "--out", out, code=2).output
    hillinfer(*common, "--exact", "--systems", "h2o", "--out", place / "never", code=2)


@pytest.mark.parametrize(
    ("system", "options"), [*((name, {}) for name in list_systems()), ("h2o", {"per_head": False})], ids=str
)
def test_a_shared_prefill_gives_the_answers_of_a_prefill_for_each(place, system, options):
    """A policy that observes the prefill must declare it (`Policy.watches`); it then observes the shared one."""
    variants = sweep.variants_of([system], [0.1, 0.4], {})
    task = find_task("needle_1k")
    record = report_record(task)
    answers = {}
    for share in (True, False):
        settings = EvalSettings(share_prefill=share, max_length=600, options=tuple(options.items()))
        job = Job("m", model_path(str(place / "model")), task, record, tuple(variants), settings, str(place))
        results = run_job(job)
        assert {row["shared"] for row in results} == {share and len(variants) > 1}
        answers[share] = [  # what streams everything may take it from where there is room at the time
            (row["system"], row["alpha"], row["pred"], row["attended"], row["rates"] if row["alpha"] else None)
            for row in results
        ]
    assert answers[True] == answers[False]
    attended = [attended for _, alpha, _, attended, _ in answers[True] if alpha]
    assert len(set(attended)) == (1 if system == "quest-dense" else len(attended))  # the model's two layers are dense


def test_a_store_has_the_documents_of_an_earlier_run(place, tmp_path, monkeypatch):
    """The same answers, and the second run opens what the first one prefilled. One that watches needs all queries."""
    opened, known = [], Keeper.open
    monkeypatch.setattr(Keeper, "open", lambda self, ids, *more: opened.append(known(self, ids, *more)) or opened[-1])
    words = ["--model", place / "model", "--tasks", "needle_1k", "--samples", "1", "--max-length", "600"]
    for systems, runs in (("topk,streaming", (None, "kv", "kv")), ("topk,h2o", ("kv",))):
        for number, store in enumerate(runs):
            more = ["--store", tmp_path / store] if store else []
            hillinfer(*words, "--systems", systems, *more, "--out", tmp_path / f"{systems}{number}")
    one, two, three = ([row["pred"] for row in read(tmp_path / f"topk,streaming{number}")] for number in range(3))
    assert one == two == three and any(one) and opened == [0, 0, 512]
    refused = hillinfer(*words, "--store", tmp_path / "kv", "--no-share-prefill", "--out", tmp_path / "x", code=2)
    assert "leave out --no-share-prefill" in refused.output


def test_a_shared_prefill_in_chunks_is_shown_to_those_that_look(place):
    variants, task = sweep.variants_of(["h2o", "snapkv", "infinigen"], [0.1, 0.4], {})[1:], find_task("needle_1k")
    answers = []
    for share in (True, False):
        settings = EvalSettings(share_prefill=share, max_length=600, prefill_chunk=200)
        job = Job("m", model_path(str(place / "model")), task, report_record(task), tuple(variants), settings)
        results = run_job(job)
        answers.append([(row["pred"], row["attended"]) for row in results])
        assert sum(row["paid_ms"] > 0 for row in results) == (1 if share else len(variants))
    assert answers[0] == answers[1]


def report_record(task):
    from hillinfer.longbench.sources import load

    return load(task)[0][0]


def test_every_task_runs_to_the_end(place, tmp_path):
    model = write_model(tmp_path / "model", ends=16)
    hillinfer(
        *("--model", model, "--data", place / "rows", "--out", tmp_path, "--max-length", 256),
        *("--tasks", "longbench,lcc_e,lines_1k", "--systems", "full", "--samples", 1),
    )
    found = read(tmp_path)
    assert {row["task"] for row in found} == {*V1, "lcc_e", "lines_1k"} and len(found) == 23
    for row in found:
        task = find_task(row["task"])
        assert row["truncated"] == (row["original_tokens"] > 256) and not row["cut_again"]
        if task.language == "en":  # Chinese is bytes to this tokenizer: see prompts.build
            assert row["prompt_tokens"] <= 256 + 2
        assert 1 <= row["new_tokens"] <= task.max_new_tokens and 0 <= row["score"] <= 1
        assert row["question_tokens"] >= 1 and not row["shared"]
    assert {row["task"]: row["buckets"] for row in found}["lcc_e"] != []
    table = pd.read_csv(tmp_path / "scores.csv")
    assert table.bucket.dropna().isin(["0-4k", "4-8k", "8k+"]).all() and len(table.bucket.dropna()) == 1
    text = (tmp_path / "report.md").read_text()
    assert "Subset, not comparable with LongBench scores" in text and "lcc 1 of 500, lcc_e 1 of 300" in text


@pytest.mark.parametrize("seed", range(3))
def test_cut_anywhere_and_resumed_the_table_is_the_same(done, common, tmp_path, seed):
    """As after a kill: complete lines, and possibly a partial one."""
    content = (done / "results.jsonl").read_bytes()
    shutil.copy(done / "manifest.json", tmp_path)
    (tmp_path / "results.jsonl").write_bytes(content[: random.Random(seed).randrange(len(content))])
    hillinfer(*common, "--out", tmp_path)
    assert (tmp_path / "scores.csv").read_bytes() == (done / "scores.csv").read_bytes()
    keys = [tuple(row[name] for name in ("model", "task", "id", "system", "alpha")) for row in read(tmp_path)]
    assert len(keys) == len(set(keys)) == 2 * 2 * 5
    assert len(read_manifest(tmp_path)["runs"]) == 2


def test_of_a_file_cut_at_any_byte_the_whole_lines_are_kept(done, tmp_path):
    lines = (done / "results.jsonl").read_bytes().splitlines(keepends=True)[:3]
    content, rows = b"".join(lines), [json.loads(line) for line in lines]
    for cut in range(len(content) + 1):
        (tmp_path / "results.jsonl").write_bytes(content[:cut])
        with Results(tmp_path) as kept:
            assert kept.rows == rows[: content[:cut].count(b"\n")]
        assert (tmp_path / "results.jsonl").read_bytes() == b"".join(lines[: len(kept.rows)])


@pytest.mark.slow
def test_killed_at_random_moments_the_table_is_the_same(done, common, tmp_path):
    command = [sys.executable, "-m", "hillinfer", "eval", *map(str, common), "--workers", "2", "--out", str(tmp_path)]
    results, rng, kills = tmp_path / "results.jsonl", random.Random(5), 0
    size = lambda: results.stat().st_size if results.exists() else 0  # noqa: E731
    while True:
        process, before = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), size()
        while process.poll() is None and size() == before:  # each run gets somewhere, and then dies
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0, 0.5))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills and process.returncode == 0
    assert (tmp_path / "scores.csv").read_bytes() == (done / "scores.csv").read_bytes()


def test_processes_give_the_same_table(done, common, tmp_path):
    hillinfer(*common, "--workers", 2, "--out", tmp_path)
    assert (tmp_path / "scores.csv").read_bytes() == (done / "scores.csv").read_bytes()


def test_a_dask_cluster_gives_the_same_table(done, common, tmp_path):
    distributed = pytest.importorskip("distributed", reason="pip install 'hillinfer[cluster]'")
    workers = dict(n_workers=1, threads_per_worker=1, dashboard_address=None)
    with distributed.LocalCluster(**workers) as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        hillinfer(*common, "--cluster", f"dask:{address}", "--out", tmp_path)
    assert (tmp_path / "scores.csv").read_bytes() == (done / "scores.csv").read_bytes()


def test_a_run_can_be_extended_and_repeats_nothing(done, common, tmp_path):
    shutil.copytree(done, tmp_path / "more")
    before = (tmp_path / "more" / "results.jsonl").read_bytes()
    hillinfer(
        *common,
        "--tasks",
        ",".join([*TASKS, "passage_retrieval_en"]),
        "--alpha",
        "0.1,0.3,0.5",
        "--out",
        tmp_path / "more",
    )
    after = (tmp_path / "more" / "results.jsonl").read_bytes()
    assert after.startswith(before) and len(read(tmp_path / "more")) == 3 * 2 * 7


def test_other_settings_or_files_in_the_same_folder_are_refused(done, common, place, tmp_path):
    for words, said in (
        (["--max-length", 99], "max_length"),
        (["--seed", 1], "seed"),
        (["--dtype", "bfloat16"], "dtype"),
    ):
        assert said in hillinfer(*common, *words, "--out", done, code=2).stderr
    other = write_rows(tmp_path / "rows", TASKS, words=50)
    words = ["--model", place / "model", "--data", other, *SMALL]
    assert "changed since" in hillinfer(*words, "--out", done, code=2).stderr


def test_a_folder_has_one_writer(tmp_path, common):
    with Results(tmp_path):
        assert "another eval" in hillinfer(*common, "--out", tmp_path, code=2).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--alpha", "lots"], "'lots' is not a list of numbers"),
        (["--alpha", "0.1,2"], "up to 1"),
        (["--tasks", "hotpot"], "no task 'hotpot'"),
        (["--tasks", ","], "no task ','; choose own"),
        (["--systems", "magic"], "no system 'magic'"),
        (["--model", "nowhere"], "config.json"),
        (["--question", "maybe"], "stepwise"),
        (["--max-length", "99999"], "lower --max-length"),
        (["--chat"], "leave out --chat"),
        (["--data", "nowhere"], "does not exist"),
        (["--cluster", "moon"], "dask:HOST:PORT"),
        (["--cluster", "dask:127.0.0.1:9"], "no dask cluster"),
        (["--compare", "nowhere", "nowhere"], "--out folder of an eval"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(common, tmp_path, monkeypatch, words, said):
    if "dask" in " ".join(words):
        distributed = pytest.importorskip("distributed", reason="pip install 'hillinfer[cluster]'")
        own = distributed.Client
        monkeypatch.setattr(distributed, "Client", lambda address, timeout: own(address, timeout=timeout / 10))
    result = hillinfer(*common, "--out", tmp_path / "out", *words, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and said in lines[0]


def test_a_prompt_that_the_chat_template_makes_too_long_is_cut_and_said(tmp_path, place):
    folder = write_model(tmp_path / "model", window=300, chat_template="{{ 'x ' * 40 }}{{ messages[0]['content'] }}")
    words = ["--data", place / "rows", "--tasks", "hotpotqa", "--max-length", 260, "--out", tmp_path / "out"]
    said = hillinfer("--model", folder, *words, "--systems", "full", "--samples", 1).stdout
    assert "1 prompts were still too long" in said
    assert read(tmp_path / "out")[0]["prompt_tokens"] == 300 - 32


def test_figures_of_the_report_are_those_of_the_rows(done):
    frame, table = report.frame_of(read(done)), pd.read_csv(done / "scores.csv")
    own = frame[(frame.system == "hillinfer") & (frame.alpha == 0.3)]
    told = table[(table.system == "hillinfer") & (table.alpha == 0.3)].set_index("task")
    for task in TASKS:
        assert told.score[task] == pytest.approx(100 * own[own.task == task].score.mean(), abs=1e-3)
    assert told.score["average"] == pytest.approx(told.score[TASKS].mean(), abs=1e-3)
    assert (table[table.system == "full"]["diff"] == 0).all() and (table.low <= table.score).all()
    text = (done / "report.html").read_text()
    assert text.count("plotly-graph-div") == 3 and "accuracy by budget" in text
    assert "shared 4 prefills" in (done / "report.md").read_text()
    cost = pd.read_csv(done / "costs.csv").set_index(["system", "alpha"])
    assert cost.drive_KiB_per_token["topk", 0.1] == 0 < cost.drive_KiB_per_token["hillinfer", 0.1]
    assert cost["attended_%"]["topk", 0.1] == pytest.approx(10, abs=3)


def test_order_of_results_does_not_matter(done):
    found = read(done)
    random.Random(1).shuffle(found)
    pd.testing.assert_frame_equal(report.scores(report.frame_of(found)), report.scores(report.frame_of(read(done))))


def test_comparison_of_two_runs(done, common, tmp_path):
    """B is constructed to answer hillinfer's questions correctly."""
    shutil.copytree(done, tmp_path / "b")
    changed = [row | ({"score": 1.0} if row["system"] == "hillinfer" else {}) for row in read(done)]
    (tmp_path / "b" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    table, facts = report.compare(done, tmp_path / "b")
    average = table[table.task == "average"].set_index(["system", "alpha"])
    assert (average.B["hillinfer"] == 100).all() and (average["diff"]["topk"] == 0).all()
    assert (average.p["topk"] == 1).all() and (average.p["hillinfer"] < 0.2).all()
    assert "20 results in both" in " ".join(facts)
    assert "B - A" in hillinfer("--compare", done, tmp_path / "b").stdout


def test_statistics_against_what_is_known():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, 400)
    mean, low, high = interval([values])
    assert mean == pytest.approx(values.mean()) and high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert interval([np.zeros(1000) + 1, np.zeros(4)])[0] == 0.5  # tasks weigh alike
    assert interval([np.ones(3), np.zeros(3)], [0.9, 0.1])[0] == pytest.approx(0.9)
    assert np.isnan(interval([np.ones(1)])[1])
    assert paired([values - 5])[3] > 0.05 > paired([values - 4.5])[3]
    assert paired([np.zeros(9)])[3] == 1
    exact = (1 + 2 * 2000 / 2**8) / 2001  # eight equal differences: 2 of 256 sign patterns are as extreme
    assert paired([np.ones(8)])[3] == pytest.approx(exact, rel=0.5)


def test_known_models_and_warnings(done):
    names = ("meta-llama/Meta-Llama-3.1-8B-Instruct", "/models/Llama-3.1-8B-Instruct/", "LLAMA-3.1-8b-instruct")
    assert {reference.find(name) for name in names} == {"Llama-3.1-8B-Instruct"}
    assert reference.find("Llama-3.1-8B") is None and len(reference.published()) == 6
    name = names[0]
    frame = report.frame_of(
        [row | {"model": name, "task": "hotpotqa", "id": f"{row['task']}{row['id']}"} for row in read(done)]
    )
    manifest = {"settings": {"question": "stepwise"}, "models": {name: {"chat": False}}}
    lines = " ".join(reference.warnings_of(frame, report.scores(frame), manifest))
    assert "hotpotqa" in lines and "(56.0)" in lines and "far below" in lines and "without a chat template" in lines
    manifest["models"][name]["chat"] = True
    assert "without" not in " ".join(reference.warnings_of(frame, report.scores(frame), manifest))


def test_samples_grow_and_are_seeded():
    records = [{"_id": i} for i in range(50)]
    few, more = sweep.sample(records, 5, 42), sweep.sample(records, 20, 42)
    assert len(few) == 5 and all(record in more for record in few) and few != sweep.sample(records, 5, 1)
    assert sweep.sample(records, 0, 42) == records and sweep.sample(records, 99, 42) == records


ENDLESS = """
import sys, time, joblib
from pathlib import Path
from hillinfer.longbench.sweep import backend
def work(i):
    Path(sys.argv[1], str(i)).touch()
    time.sleep(600)
with backend(joblib, 2, None) as parallel:
    list(parallel(joblib.delayed(work)(i) for i in range(2)))
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:  # until both work
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert len(members(process.pid)) >= 3
    process.kill()
    process.wait()
    while members(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_rows_of_our_own_are_seeded():
    assert rows("trec") == rows("trec") and longbench()["trec"].metric == "classification"


def test_fidelity_is_in_the_csv_the_report_and_the_figures(place, tmp_path):
    words = ["--model", place / "model", "--data", place / "rows", "--tasks", "passage_count", "--samples", "2"]
    words += ["--systems", "topk,streaming", "--alpha", "0.1,0.4", "--question", "both", "--max-length", "300"]
    hillinfer(*words, "--fidelity", "both", "--no-answers", "--out", tmp_path)
    table = pd.read_csv(tmp_path / "fidelity.csv")
    assert set(zip(table.question, table.answer, strict=True)) == {
        (question, answer) for question in ("stepwise", "prefilled") for answer in ("reference", "own")
    }
    means = table.groupby(["system", "alpha"]).kl.mean()
    assert means["full", 1.0] == 0 < means["topk", 0.4] < means["topk", 0.1]
    assert (table.baseline == "topk").all() and (table.to_baseline[table.system == "topk"] == 0).all()
    assert "KL to full" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count("divergence on the") == 4
