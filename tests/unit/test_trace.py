"""The trace of a phase: what Perfetto asks of trace-event JSON, and that the picture says what the timeline says."""

import json
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from rollout.spans import Recording, Span, record_phase, record_span, recorded, span
from rollout.throughput import EXECUTE, LAUNCH, UPDATE, WAIT, PhaseTimeline
from rollout.trace import merge_traces, recording_events, trace_events, write_trace
from tests.trace_format import check_format, check_nesting, spans_by_track


def asynchronous_timeline(start: float = 100.0) -> PhaseTimeline:
    """Three steps of 10 ms, two under way at once; the device begins step i+1 before the clock says that i ended."""
    timeline = PhaseTimeline()
    for step, (live, tokens) in enumerate([(4, 40), (4, 4), (3, 3)]):
        t = start + 0.010 * step
        timeline.record_schedule(step, t, t + 0.001, live, tokens)
        timeline.record(LAUNCH, step, t + 0.002, t + 0.003)
        timeline.record(EXECUTE, step, t + 0.003, t + 0.0135)
        timeline.record(WAIT, step, t + 0.011, t + 0.0135)
        timeline.record(UPDATE, step, t + 0.0135, t + 0.014)
    return timeline


def spans(events: list[dict]) -> list[dict]:
    return [event for event in events if event["ph"] == "X"]


def test_each_span_becomes_an_event_in_microseconds_on_its_track():
    events = trace_events(asynchronous_timeline(), rank=3)
    check_format(events)
    assert {event["pid"] for event in events} == {3}
    titles = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    by_track = defaultdict(set)
    for event in spans(events):
        by_track[titles[event["tid"]]].add(event["name"])
    assert by_track == {
        "main thread": {"schedule", "wait", "update"},
        "execute thread": {"launch"},
        "device": {"execute"},
    }
    assert len(spans(events)) == 3 * 5
    (launch,) = [event for event in spans(events) if event["name"] == "launch" and event["args"]["step"] == 1]
    assert launch["ts"] == pytest.approx(100.012e6, abs=0.01)  # 100 s + 10 ms + 2 ms
    assert launch["dur"] == pytest.approx(1000.0, abs=0.01)  # 1 ms
    assert launch["args"] == {"step": 1, "live_sequences": 4, "scheduled_tokens": 4}


def test_events_stand_in_order_of_time_and_spans_of_a_track_do_not_overlap():
    events = spans(trace_events(asynchronous_timeline()))
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    ends: dict[int, float] = {}
    for event in events:
        assert event["ts"] >= ends.get(event["tid"], 0.0) - 0.01  # rounding, in microseconds
        ends[event["tid"]] = event["ts"] + event["dur"]


def test_counters_follow_the_schedule():
    counters = [event for event in trace_events(asynchronous_timeline()) if event["ph"] == "C"]
    of = defaultdict(list)
    for event in counters:
        of[event["name"]].append(event["args"][event["name"]])
    assert of == {"live sequences": [4, 4, 3, 0], "scheduled tokens": [40, 4, 3, 0]}
    assert counters[0]["ts"] == pytest.approx(100.001e6, abs=0.01)  # when the first schedule ended


def test_what_was_not_recorded_is_left_out():
    timeline = PhaseTimeline()
    timeline.record(UPDATE, 2, 1.0, 2.0)
    events = trace_events(timeline)
    check_format(events)
    (update,) = spans(events)
    assert update["args"] == {"step": 2}
    assert {event["args"].get("name") for event in events if event["ph"] == "M"} == {"rank 0", "main thread", None}
    assert not spans(trace_events(PhaseTimeline()))


def test_ranks_merge_into_one_file(tmp_path: Path):
    parts = [
        write_trace(asynchronous_timeline(100.0 + rank), tmp_path / f"rank{rank}.json", rank=rank) for rank in (0, 1)
    ]
    merged = json.loads(merge_traces(parts, tmp_path / "merged.json").read_text(), parse_constant=pytest.fail)
    check_format(merged["traceEvents"])
    assert {event["pid"] for event in merged["traceEvents"]} == {0, 1}
    assert len(spans(merged["traceEvents"])) == 2 * 15
    assert merged["displayTimeUnit"] == "ms"
    first = {rank: min(e["ts"] for e in spans(merged["traceEvents"]) if e["pid"] == rank) for rank in (0, 1)}
    assert first[1] - first[0] == pytest.approx(1e6, abs=0.01)  # one clock: as far apart as they ran


def test_two_files_of_one_rank_are_refused(tmp_path: Path):
    part = write_trace(asynchronous_timeline(), tmp_path / "a.json", rank=1)
    with pytest.raises(ValueError, match="holds rank 1.*write each rank's trace with its own rank"):
        merge_traces([part, part], tmp_path / "merged.json")


def test_nan_never_reaches_the_file(tmp_path: Path):
    timeline = asynchronous_timeline()
    timeline.record(LAUNCH, 5, 101.0, 102.0)  # steps 3 and 4 have nothing at all
    text = write_trace(timeline, tmp_path / "trace.json").read_text()
    events = json.loads(text, parse_constant=pytest.fail)["traceEvents"]
    check_format(events)
    assert not np.isnan([event["ts"] for event in events]).any()


def test_a_recording_has_the_spans_of_all_threads_and_the_phases():
    def execute() -> None:
        with span("copy weights"):
            pass

    with recorded() as recording:
        with span("step 3"), span("generate", prompts=2):
            record_phase(asynchronous_timeline(time.perf_counter()))
            thread = threading.Thread(target=execute, name="execute-rank1")
            thread.start()
            thread.join()
            time.sleep(0.05)  # the made-up phase takes 34 ms
        record_span("reward worker 0", "reward", 1.0, 2.0)
        with recorded_twice():
            pass
    events = recording_events(recording, rank=1)
    check_format(events)
    check_nesting(events)
    assert spans_by_track(events) == {
        (1, "main thread"): {"step 3", "generate", "schedule", "wait", "update"},
        (1, "execute thread"): {"copy weights", "launch"},
        (1, "device"): {"execute"},
        (1, "reward worker 0"): {"reward"},
    }
    (generate,) = [event for event in spans(events) if event["name"] == "generate"]
    assert generate["args"] == {"prompts": 2}


@contextmanager
def recorded_twice():
    with pytest.raises(RuntimeError, match="recorded already"), recorded():
        pass
    yield


def test_nothing_is_kept_and_nothing_made_where_nobody_records():
    assert span("forward") is span("backward", responses=3)
    with span("forward"):
        record_span("reward worker 0", "reward", 1.0, 2.0)
        record_phase(asynchronous_timeline())
    with recorded() as recording:
        pass
    assert recording == Recording()


def test_the_outer_one_of_two_spans_that_begin_together_comes_first_and_rounding_keeps_them_inside():
    inner = [Span("main thread", "inner", 1.0 + i / 7e6, 1.0 + (i + 1) / 7e6, {}) for i in range(1000)]
    outer = Span("main thread", "outer", 1.0, inner[-1].end, {})
    events = recording_events(Recording([*inner, outer]))
    check_format(events)
    check_nesting(events)
    assert spans(events)[0]["name"] == "outer"


def test_a_clock_that_is_ahead_is_put_back():
    events = recording_events(Recording([Span("main thread", "sync", 1001.0, 1002.0, {})]), seconds_ahead=1000.25)
    assert spans(events)[0]["ts"] == 0.75e6


def test_spans_that_overlap_are_found():
    across = [Span("main thread", "a", 1.0, 2.0, {}), Span("main thread", "b", 1.5, 2.5, {})]
    with pytest.raises(AssertionError, match="ends after the span that it began in"):
        check_nesting(recording_events(Recording(across)))
