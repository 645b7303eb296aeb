"""What this rank does and when, span by span, while somebody records: the stuff that a step's timeline is made of.

Any thread may open a span. Where nobody records, that is one look at a module's variable.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rollout.throughput import PhaseTimeline

MAIN_THREAD, EXECUTE_THREAD = "main thread", "execute thread"


class Span(NamedTuple):
    """Something that took a while.

    Attributes:
        track: the thread that did it, or a process of this rank's.
        name: what was done.
        start: `time.perf_counter` seconds.
        end: likewise.
        args: numbers that the viewer shows with it.
    """

    track: str
    name: str
    start: float
    end: float
    args: dict[str, Any]


@dataclass
class Recording:
    """Of this rank.

    Attributes:
        spans: in the order in which they ended.
        phases: of each `generate`, its steps.
    """

    spans: list[Span] = field(default_factory=list)
    phases: list[PhaseTimeline] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record what this process does inside, on all its threads.

    Raises:
        RuntimeError: if somebody records already.

    >>> with recorded() as recording, span("reward", responses=2):
    ...     pass
    >>> [(each.track, each.name, each.args) for each in recording.spans]
    [('main thread', 'reward', {'responses': 2})]
    """
    global _recording
    if _recording is not None:
        raise RuntimeError("this process is being recorded already: end that first")
    recording = _recording = Recording()
    try:
        yield recording
    finally:
        _recording = None


def span(name: str, **args: Any) -> AbstractContextManager[None]:
    """What is done inside, as one span of this thread. Spans of a thread lie inside each other or apart.

    Args:
        name: what is done.
        args: numbers that the viewer shows with it.
    """
    return _NOTHING if _recording is None else _Open(_recording, name, args)


def record_span(track: str, name: str, start: float, end: float, **args: Any) -> None:
    """Record what another process of this rank's did; its spans must not overlap. Nothing, where nobody records."""
    if _recording is not None:
        _recording.spans.append(Span(track, name, start, end, args))


def record_phase(timeline: PhaseTimeline) -> None:
    """Record the steps of one `generate`, both threads quiet. Nothing, where nobody records."""
    if _recording is not None:
        _recording.phases.append(timeline)


class _Open(AbstractContextManager[None]):
    def __init__(self, recording: Recording, name: str, args: dict[str, Any]) -> None:
        self._recording, self._name, self._args = recording, name, args

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        end = time.perf_counter()
        self._recording.spans.append(Span(_this_thread(), self._name, self._start, end, self._args))


def _this_thread() -> str:
    thread = threading.current_thread()
    if thread is threading.main_thread():
        return MAIN_THREAD
    return EXECUTE_THREAD if thread.name.startswith("execute-rank") else thread.name


_NOTHING = nullcontext()
_recording: Recording | None = None
