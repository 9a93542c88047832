"""The timeline of a run is complete and readable by other tools."""

import json

import pytest
import torch

import hillinfer
from hillinfer.timeline import LANES, Timeline


def overlapping() -> Timeline:
    timeline = Timeline()
    timeline.add("drive", "read", 0, 1, 1_000, 5_000, 4096)
    timeline.add("drive", "read", 1, 1, 2_000, 3_000)
    timeline.add("cpu", "score", 0, 1, 1_500, 2_500)
    timeline.add("drive", "read", 2, 1, 6_000, 7_000)
    return timeline


def test_chrome_trace_puts_concurrent_spans_on_sub_tracks(tmp_path):
    trace = json.loads(overlapping().save(tmp_path / "new" / "trace.json").read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 4
    assert all(isinstance(event[key], int) for event in trace["traceEvents"] for key in ("pid", "tid"))
    by_track = {}
    for event in sorted(spans, key=lambda e: e["ts"]):
        last = by_track.get((event["pid"], event["tid"]), 0)
        assert event["ts"] >= last
        by_track[event["pid"], event["tid"]] = event["ts"] + event["dur"]
    assert {event["pid"] for event in spans} == {LANES.index("drive"), LANES.index("cpu")}
    assert spans[0]["args"]["bytes"] == 4096


def test_frame_and_busy_time():
    timeline = overlapping()
    frame = timeline.frame()
    assert list(frame.columns[:4]) == ["lane", "kind", "layer", "step"] and len(frame) == 4
    assert frame.ms.tolist() == [0.004, 0.001, 0.001, 0.001]
    assert [timeline.busy_ms(lane) for lane in LANES] == [0, 0.001, 0.005, 0]
    assert timeline.busy_ms() == timeline.busy_ms("drive")  # the cpu's span lies within the drive's
    assert timeline.overlap() == 1
    timeline.add("cpu", "attend", 0, 1, 5_000, 8_000)
    timeline.add("cpu", "wait", 0, 1, 0, 100_000)
    assert timeline.overlap() == pytest.approx(0.5)  # 2 of the 4 us of the cpu, the shorter side
    assert Timeline().frame().empty and Timeline().chrome_trace()["traceEvents"]


def test_a_wrong_lane_is_refused():
    with pytest.raises(ValueError, match="lanes are"):
        Timeline().add("tpu", "score", 0, 0, 0, 1)


def test_a_run_records_every_stage_and_every_token(models, prompt, tmp_path):
    model = models("llama")
    cache = hillinfer.make_cache(model, "hillinfer", alpha=0.2, drive=tmp_path, recent=4)
    model.generate(prompt, past_key_values=cache, max_new_tokens=10, do_sample=False)
    frame = cache.timeline.frame()
    kinds = {"append", "encode", "score", "select", "gather", "read", "write", "attend"}
    assert kinds <= set(frame.kind)
    assert (frame.end_ns >= frame.start_ns).all()
    decode = frame[(frame.kind == "attend")]
    assert len(decode) == 9 * model.config.num_hidden_layers  # the first new token comes from the prefill
    hits = cache.counters.frame()
    assert len(hits) == len(decode)
    assert (hits.device + hits.host + hits.drive == hits.queries).all()
    assert (hits.demoted <= hits.drive).all()
    assert sum(cache.counters.rates().values()) == pytest.approx(1)
    record = 2 * 2 * 16 * 4
    reads = frame[frame.kind == "read"].bytes.sum()
    assert reads >= hits.drive.sum() * record
    memory = cache.memory()
    assert memory["codes"] >= cache.get_seq_length() * 2 * 16 * 3 and memory["drive"] > 0
    cache.close()
    assert sum(cache.memory().values()) == 0


def test_inference_mode_and_plain_calls_may_be_mixed(models, prompt):
    """Prefill in one mode and generate in the other, with buffers that outlive both."""
    model = models("llama")
    for prefill in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        cache = hillinfer.make_cache(model, "topk", alpha=0.5)
        with prefill():
            model(prompt[:, :-1], past_key_values=cache)
            model(prompt[:, -1:], past_key_values=cache)
        with torch.inference_mode():
            out = model(prompt[:, :1], past_key_values=cache)
        assert torch.isfinite(out.logits).all()
