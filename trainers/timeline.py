"""A step's timeline: what each thread of each rank did, in RUN/timeline, for the steps of run.timeline_steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rollout import Recording, World, recorded, recording_events, seconds_ahead, span, write_events

FOLDER = "timeline"


@contextmanager
def timed_by_thread(step: int, steps: Sequence[int], folder: Path, world: World) -> Iterator[None]:
    """Record the step inside and write its timeline afterwards, if it is one of `steps`; called by all ranks.

    Args:
        step: of the run, from 0.
        steps: to record.
        folder: of the run.
    """
    if step not in steps:
        yield
        return
    with recorded() as recording, span(f"step {step}"):
        yield
    write_timeline(recording, folder, step, world)


def write_timeline(recording: Recording, folder: Path, step: int, world: World) -> None:
    """All ranks' recordings into RUN/timeline/step-NNNNN.json, on rank 0's clock; a collective."""
    ours = recording_events(recording, world.rank, seconds_ahead())
    everyones: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(ours, everyones, dst=0)
    if everyones is not None:
        (folder / FOLDER).mkdir(exist_ok=True)
        write_events([event for events in everyones for event in events], timeline_file(folder, step))


def timeline_file(folder: Path, step: int) -> Path:
    """Where a step's timeline is.

    >>> timeline_file(Path("runs/x"), 2).as_posix()
    'runs/x/timeline/step-00002.json'
    """
    return folder / FOLDER / f"step-{step:05d}.json"
