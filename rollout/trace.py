"""A phase of generation, or a whole recording, as a picture over time: trace-event JSON, which ui.perfetto.dev opens.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.spans import EXECUTE_THREAD, MAIN_THREAD, Recording
from rollout.throughput import EXECUTE, LAUNCH, SCHEDULE, UPDATE, WAIT, PhaseTimeline, busy_spans

MAIN, EXECUTING, DEVICE = 1, 2, 3
TRACKS = {MAIN: MAIN_THREAD, EXECUTING: EXECUTE_THREAD, DEVICE: "device"}
"""By tid; other tracks of a recording follow."""
_HOST_SPANS = (
    (SCHEDULE, "schedule", MAIN),
    (WAIT, "wait", MAIN),
    (UPDATE, "update", MAIN),
    (LAUNCH, "launch", EXECUTING),
)


def trace_events(timeline: PhaseTimeline, rank: int = 0) -> list[dict[str, Any]]:
    """The events of one rank's phase, in order of time, names of process and tracks first.

    One process a rank (pid), three tracks in it (tid): the main thread's schedule, wait and update; the execute
    thread's launch; the device's execute, where it was recorded. Each span carries its step, and what that step was
    scheduled with. Two counters show the live sequences and the scheduled tokens over time.

    Args:
        timeline: of the phase, both threads quiet.
        rank: whose timeline it is.

    Returns:
        Trace events. Times are `time.perf_counter()` in microseconds, the same clock in all processes of a machine,
        so that the ranks of one machine stand under each other as they ran.

    >>> timeline = PhaseTimeline()
    >>> timeline.record_schedule(0, 1.0, 1.5, live_sequences=2, scheduled_tokens=10)
    >>> span = next(event for event in trace_events(timeline) if event["ph"] == "X")
    >>> span["name"], span["ts"], span["dur"], span["args"]
    ('schedule', 1000000.0, 500000.0, {'step': 0, 'live_sequences': 2, 'scheduled_tokens': 10})
    """
    return _named(_of_phase(timeline, rank), rank, TRACKS)


def recording_events(recording: Recording, rank: int = 0, seconds_ahead: float = 0.0) -> list[dict[str, Any]]:
    """As `trace_events`, of all that one rank has recorded: its spans, and the phases of generation.

    A process a rank, a track in it for each thread (and each process of the rank's own). Spans of a track lie inside
    each other or apart, and of two that begin together the outer one comes first.

    Args:
        recording: of `rollout.recorded`, at its end.
        rank: whose it is.
        seconds_ahead: of this rank's clock, that is taken off (rollout/clocks.py).

    >>> from rollout.spans import Span
    >>> events = recording_events(Recording([Span("main thread", "reward", 2.0, 2.5, {})]), rank=1)
    >>> [(event["name"], event["pid"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    [('reward', 1, 2000000.0, 500000.0)]
    """
    names = [*TRACKS.values(), *sorted({each.track for each in recording.spans} - set(TRACKS.values()))]
    tracks = dict(enumerate(names, start=MAIN))
    numbers = {name: track for track, name in tracks.items()}
    events = [event for timeline in recording.phases for event in _of_phase(timeline, rank)]
    for each in recording.spans:
        start, end = _microseconds(each.start), _microseconds(each.end)
        where = {"pid": rank, "tid": numbers[each.track]}
        events.append({"ph": "X", "name": each.name, **where, "ts": start, "dur": end - start, "args": each.args})
    for event in events:
        event["ts"] -= _microseconds(seconds_ahead)
    return _named(events, rank, tracks)


def write_trace(timeline: PhaseTimeline, path: Path | str, rank: int = 0) -> Path:
    """Write one rank's phase as a trace file, to be opened at https://ui.perfetto.dev or chrome://tracing.

    Args:
        timeline: of the phase, such as `RolloutEngine.timeline` after `generate`.
        path: the file to write; its folder must exist.
        rank: whose timeline it is; its number in the picture. Several ranks' files: `merge_traces`.

    Returns:
        The file.

    Example: `write_trace(engine.timeline, "phase.json", engine.world.rank)`
    """
    return write_events(trace_events(timeline, rank), path)


def merge_traces(parts: Sequence[Path | str], path: Path | str) -> Path:
    """Join the trace files of several ranks into one, a process a rank.

    Args:
        parts: files of `write_trace`, each with another rank.
        path: the file to write; may be one of the parts.

    Raises:
        ValueError: if two of the parts have the same rank.
    """
    events: list[dict[str, Any]] = []
    for part in parts:
        own = json.loads(Path(part).read_text())["traceEvents"]
        again = {event["pid"] for event in own} & {event["pid"] for event in events}
        if again:
            raise ValueError(
                f"{part} holds rank {min(again)}, which another of the files to merge holds already: "
                "write each rank's trace with its own rank"
            )
        events += own
    return write_events(events, path)


def write_events(events: list[dict[str, Any]], path: Path | str) -> Path:
    """Write trace events, of as many ranks as there are, as a trace file; returns it."""
    path = Path(path)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False))
    return path


def _of_phase(timeline: PhaseTimeline, rank: int) -> list[dict[str, Any]]:
    """Spans and counters of one phase, in no order."""
    steps, args = np.arange(timeline.num_steps), _step_args(timeline)
    events = []
    for kind, name, track in _HOST_SPANS:
        events += _spans(timeline.spans(kind), steps, args, name, rank, track)
    if not np.isnan(timeline.spans(EXECUTE)).all():
        # Cut so that none begins before its predecessor ended: the viewer cannot draw spans of a track that overlap.
        events += _spans(*busy_spans(timeline), args, "execute", rank, DEVICE)
    return events + _counters(timeline, rank)


def _named(events: list[dict[str, Any]], rank: int, tracks: Mapping[int, str]) -> list[dict[str, Any]]:
    """In order of time, behind the names of the process and of the tracks in use."""
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    used = {event["tid"] for event in events if event["ph"] == "X"}
    return _names(rank, {track: name for track, name in tracks.items() if track in used}) + events


def _microseconds(seconds: Any) -> Any:
    """Whole ones: viewers cut fractions off, after which the end of a span may lie behind that of the one around it."""
    return np.rint(seconds * 1e6) if isinstance(seconds, np.ndarray) else float(round(seconds * 1e6))


def _spans(
    spans: np.ndarray, steps: np.ndarray, args: list[dict[str, int]], name: str, rank: int, track: int
) -> list[dict[str, Any]]:
    """Complete events (ph X) of the spans that were recorded: spans (k, 2) seconds, steps (k,), args one a step."""
    recorded = ~np.isnan(spans[:, 0])
    micros = _microseconds(spans[recorded])
    starts, durations = micros[:, 0].tolist(), (micros[:, 1] - micros[:, 0]).tolist()
    return [
        {"ph": "X", "name": name, "pid": rank, "tid": track, "ts": start, "dur": duration, "args": args[step]}
        for start, duration, step in zip(starts, durations, steps[recorded].tolist(), strict=True)
    ]


def _step_args(timeline: PhaseTimeline) -> list[dict[str, int]]:
    """Each step's number and what it was scheduled with, where that was recorded."""
    counts = zip(timeline.live_sequences.tolist(), timeline.scheduled_tokens.tolist(), strict=True)
    return [
        {"step": step} | ({"live_sequences": live, "scheduled_tokens": tokens} if live >= 0 else {})
        for step, (live, tokens) in enumerate(counts)
    ]


def _counters(timeline: PhaseTimeline, rank: int) -> list[dict[str, Any]]:
    """Counter events (ph C) at the end of each schedule, and 0 after the last update."""
    ends = _microseconds(timeline.spans(SCHEDULE)[:, 1]).tolist()
    counts = {
        "live sequences": timeline.live_sequences.tolist(),
        "scheduled tokens": timeline.scheduled_tokens.tolist(),
    }
    events = [
        {"ph": "C", "name": name, "pid": rank, "tid": MAIN, "ts": end, "args": {name: values[step]}}
        for name, values in counts.items()
        for step, end in enumerate(ends)
        if not math.isnan(end)
    ]
    updates = timeline.spans(UPDATE)[:, 1]
    if events and not np.isnan(updates).all():
        # A viewer goes on with the last value to the end of the picture.
        over = {"ph": "C", "pid": rank, "tid": MAIN, "ts": _microseconds(float(np.nanmax(updates)))}
        events += [over | {"name": name, "args": {name: 0}} for name in counts]
    return events


def _names(rank: int, tracks: Mapping[int, str]) -> list[dict[str, Any]]:
    """Metadata events (ph M): what the viewer calls the process and its tracks, and their order from above."""
    metadata: list[tuple[int, str, dict[str, Any]]] = [
        (MAIN, "process_name", {"name": f"rank {rank}"}),
        (MAIN, "process_sort_index", {"sort_index": rank}),
    ]
    for track, name in tracks.items():
        metadata.append((track, "thread_name", {"name": name}))
        metadata.append((track, "thread_sort_index", {"sort_index": track}))
    return [
        {"ph": "M", "name": name, "pid": rank, "tid": track, "ts": 0.0, "args": args} for track, name, args in metadata
    ]
