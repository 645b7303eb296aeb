"""The timeline of a phase and the figures made of it, against sums done by hand."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from rollout.throughput import (
    EXECUTE,
    LAUNCH,
    SCHEDULE,
    UPDATE,
    WAIT,
    PhaseTimeline,
    busy_spans,
    merge_groups,
    overlap_fraction,
    phase_metrics,
)

EXACT = dict(rel=1e-12, abs=1e-12)


def synchronous_timeline(live: tuple[int, ...] = (4, 4, 4, 4)) -> PhaseTimeline:
    """Step i at t = 10 i: schedule 1 s, launch 4 s (the wait lies over it), update 2 s, then 3 s of nothing."""
    timeline = PhaseTimeline()
    for step, sequences in enumerate(live):
        t = 10.0 * step
        timeline.record_schedule(step, t, t + 1, sequences, sequences)
        timeline.record(LAUNCH, step, t + 1, t + 5)
        timeline.record(WAIT, step, t + 1, t + 5)
        timeline.record(UPDATE, step, t + 5, t + 7)
    return timeline


def metrics_of(timeline: PhaseTimeline, **changed) -> dict[str, float]:
    arguments = dict(
        seconds=8.0,
        num_sequences=4,
        response_lengths=np.array([1, 2, 3, 6], np.int32),
        finished=np.array([True, True, True, False]),
        kv_cache_usage_peak=0.5,
        preemptions=3,
    )
    return phase_metrics(timeline, **(arguments | changed))


def test_every_name_and_figure_of_a_synchronous_phase():
    metrics = metrics_of(synchronous_timeline())
    assert metrics == pytest.approx(
        {
            "rollout/generated_tokens": 12,  # 1 + 2 + 3 + 6
            "rollout/generated_tokens_per_s": 1.5,  # 12 / 8 s
            "rollout/seconds": 8.0,
            "rollout/sequences": 4,
            "rollout/decode_steps": 4,
            # Launches at 1-5, 11-15, 21-25, 31-35: three gaps of 6 s in 34 s.
            "rollout/host_gap_fraction": 18 / 34,
            "rollout/schedule_ms": 1000.0,
            "rollout/launch_ms": 4000.0,
            "rollout/wait_ms": 4000.0,
            "rollout/update_ms": 2000.0,
            "rollout/tail_fraction": 0.0,
            "rollout/kv_cache_usage": 0.5,
            "rollout/preemptions": 3,
            "rollout/response_tokens_mean": 3.0,  # 12 / 4
            "rollout/response_tokens_p50": 2.5,  # between 2 and 3
            "rollout/response_tokens_p99": 5.91,  # rank 0.99 * 3 = 2.97: 3 + 0.97 * (6 - 3)
            "rollout/truncated_fraction": 0.25,  # one of four
        },
        **EXACT,
    )


def test_what_cannot_be_known_is_left_out():
    none = np.array([], np.int32)
    assert metrics_of(
        PhaseTimeline(),
        seconds=0.0,
        num_sequences=0,
        response_lengths=none,
        finished=none.astype(bool),
        kv_cache_usage_peak=None,
        preemptions=0,
    ) == {
        "rollout/generated_tokens": 0,
        "rollout/seconds": 0.0,
        "rollout/sequences": 0,
        "rollout/decode_steps": 0,
        "rollout/preemptions": 0,
    }


def test_medians_ignore_one_slow_step():
    timeline = PhaseTimeline()
    for step, length in enumerate([0.001, 0.002, 5.0]):
        timeline.record(WAIT, step, 7.0, 7.0 + length)
    assert metrics_of(timeline)["rollout/wait_ms"] == pytest.approx(2.0, rel=1e-9)


def test_a_step_without_tokens_is_no_decode_step():
    metrics = metrics_of(synchronous_timeline(live=(4, 4, 0)))
    assert metrics["rollout/decode_steps"] == 2
    assert metrics["rollout/tail_fraction"] == pytest.approx(4 / 24, **EXACT)  # 21 to 25 of 1 to 25


def test_tail_begins_when_under_a_quarter_of_the_peak_is_left():
    # Steps start at 1, 11, ..., 51, the last ends at 55: 54 s. Peak 8, so a quarter is 2.
    # The ramp-up (1) and the dip (1) come before the last step with at least 2 (step 3): only steps 4 and 5 are tail,
    # from 41 to 55.
    timeline = synchronous_timeline(live=(1, 8, 1, 2, 1, 1))
    assert metrics_of(timeline)["rollout/tail_fraction"] == pytest.approx(14 / 54, **EXACT)


def test_a_full_batch_before_a_long_queue_is_no_tail():
    # 4 of 100 sequences run at a time: 4 is the peak, and it never falls.
    metrics = metrics_of(
        synchronous_timeline(), num_sequences=100, response_lengths=np.ones(100, int), finished=np.ones(100, bool)
    )
    assert metrics["rollout/tail_fraction"] == 0.0


def test_synchronous_steps_hide_nothing():
    assert overlap_fraction(synchronous_timeline()) == 0.0


def test_overlap_counts_only_other_steps_time_on_the_device():
    timeline = PhaseTimeline()
    timeline.record(LAUNCH, 0, 10.0, 20.0)
    timeline.record(LAUNCH, 1, 21.0, 31.0)
    timeline.record(LAUNCH, 2, 31.0, 41.0)
    timeline.record(SCHEDULE, 0, 8.0, 10.0)  # 2 s, none hidden
    timeline.record(SCHEDULE, 1, 11.0, 12.0)  # 1 s, all of it behind step 0
    timeline.record(UPDATE, 0, 19.0, 23.0)  # 4 s: 19-20 is its own step, 20-21 nothing, 21-23 behind step 1
    timeline.record(UPDATE, 1, 30.0, 33.0)  # 3 s: 30-31 its own step, 31-33 behind step 2
    # Hidden: 0 + 1 + 2 + 2 = 5 of 2 + 1 + 4 + 3 = 10.
    assert overlap_fraction(timeline) == pytest.approx(0.5, **EXACT)


def test_overlap_is_unknown_without_either_side():
    only_main, only_device = PhaseTimeline(), PhaseTimeline()
    only_main.record(SCHEDULE, 0, 0.0, 1.0)
    only_device.record(LAUNCH, 0, 0.0, 1.0)
    assert overlap_fraction(only_main) is None
    assert overlap_fraction(only_device) is None


def test_a_device_that_runs_ahead_is_measured_by_its_own_spans():
    timeline = PhaseTimeline()
    for step in range(3):
        timeline.record(LAUNCH, step, 10.0 * step, 10.0 * step + 1)  # 9 s gaps between launches
        # The device is still at step i until 10 i + 12, so it takes step i+1 only then: never idle.
        timeline.record(EXECUTE, step, 10.0 * step + 1, 10.0 * step + 12)
    busy, steps = busy_spans(timeline)
    assert busy.tolist() == [[1.0, 12.0], [12.0, 22.0], [22.0, 32.0]]
    assert steps.tolist() == [0, 1, 2]
    metrics = metrics_of(timeline)
    assert metrics["rollout/host_gap_fraction"] == 0.0
    assert metrics["rollout/launch_ms"] == pytest.approx(1000.0, **EXACT)


def test_arrays_grow():
    timeline = PhaseTimeline(capacity=2)
    for step in range(9):
        timeline.record_schedule(step, step, step + 0.5, live_sequences=step, scheduled_tokens=2 * step)
    assert timeline.spans(SCHEDULE).tolist() == [[step, step + 0.5] for step in range(9)]
    assert timeline.live_sequences.tolist() == list(range(9))
    assert timeline.scheduled_tokens.tolist() == list(range(0, 18, 2))
    assert np.isnan(timeline.spans(LAUNCH)).all() and len(timeline.spans(LAUNCH)) == 9


def test_two_threads_write_without_loss_while_the_arrays_grow():
    num_steps, timeline = 20_000, PhaseTimeline(capacity=1)
    observe = timeline.launch_observer()

    def execute_thread():
        for step in range(num_steps):
            observe(float(step), step + 0.25)

    thread = threading.Thread(target=execute_thread)
    thread.start()
    for step in range(num_steps):
        timeline.record_schedule(step, float(step), step + 0.5, step, step)
    thread.join(timeout=30)
    expected = np.arange(num_steps, dtype=float)
    assert np.array_equal(timeline.spans(LAUNCH), np.stack([expected, expected + 0.25], axis=1))
    assert np.array_equal(timeline.spans(SCHEDULE), np.stack([expected, expected + 0.5], axis=1))
    assert np.array_equal(timeline.live_sequences, np.arange(num_steps))


def test_groups_add_their_tokens_and_share_the_longest_time():
    small = metrics_of(synchronous_timeline(), seconds=6.0)
    large = metrics_of(
        synchronous_timeline(),
        seconds=10.0,
        num_sequences=12,
        response_lengths=np.full(12, 7),
        finished=np.ones(12, bool),
        kv_cache_usage_peak=0.75,
    )
    merged = merge_groups([small, large])
    assert merged.keys() == small.keys() | {"rollout/imbalance"}
    assert merged["rollout/generated_tokens"] == 96  # 12 + 12 * 7
    assert merged["rollout/generated_tokens_per_s"] == pytest.approx(9.6, **EXACT)  # 96 / 10 s
    assert merged["rollout/imbalance"] == pytest.approx(1.25, **EXACT)  # 10 s / 8 s
    assert merged["rollout/sequences"] == 16
    assert merged["rollout/preemptions"] == 6
    assert merged["rollout/kv_cache_usage"] == 0.75
    assert merged["rollout/response_tokens_mean"] == pytest.approx(6.0, **EXACT)  # 96 / 16
    assert merged["rollout/truncated_fraction"] == pytest.approx(1 / 16, **EXACT)
    assert merged["rollout/schedule_ms"] == pytest.approx(1000.0, **EXACT)


def test_one_group_merges_to_itself():
    metrics = metrics_of(synchronous_timeline())
    assert merge_groups([metrics]) == pytest.approx(metrics, **EXACT)


def test_every_name_is_explained_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    explained = set(re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE))
    metrics = metrics_of(synchronous_timeline())
    assert merge_groups([metrics, metrics]).keys() <= explained
